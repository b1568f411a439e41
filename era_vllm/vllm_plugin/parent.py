"""No process of a server outlives the one that started it: API servers, engines, workers.

Each has a pipe of ``multiprocessing`` whose other end its parent holds; the kernel is told to send
SIGKILL when that end closes, as it does however the parent ends. So this needs neither the
interpreter nor its lock, and ends a process that hangs in a kernel or is stopped. Not
``PR_SET_PDEATHSIG``: that follows the thread that started the process, which may end before.
vLLM's own pipe (``multiproc_executor.py``) only asks a worker to stop, and an engine has none.

A parent that loses a child ends by vLLM's own means, which take 5 s for the others of each kind;
so it is given 3 s in all, in which clients are told.
"""

import fcntl
import logging
import os
import signal
import threading
from multiprocessing import connection, parent_process
from typing import Final

from era_vllm.compat import process_targets

_F_SETSIG: Final = 10
"""Of Linux's fcntl.h; Python has no name for it."""
_ENDING_S: Final = 3.0
_log = logging.getLogger(__name__)


def end_with_parent() -> None:
    """Have this process killed when its parent ends; nothing in the first process of a server."""
    if (parent := parent_process()) is None:
        return
    pipe = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if connection.wait([pipe], 0):  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


def end_soon() -> None:
    """Have this process end with 1, and all that it started with it, if it does not by itself."""

    def end() -> None:
        _log.error("the server lost a process, and is ended with all the others")
        os._exit(1)

    timer = threading.Timer(_ENDING_S, end)
    timer.daemon = True
    timer.start()


def run_engine(*arguments: object, **named: object) -> None:
    """Run vLLM's engine in its process."""
    end_with_parent()
    process_targets.ENGINE(*arguments, **named)


def run_coordinator(*arguments: object, **named: object) -> None:
    """Run vLLM's coordinator of data-parallel engines in its process."""
    end_with_parent()
    process_targets.COORDINATOR(*arguments, **named)
