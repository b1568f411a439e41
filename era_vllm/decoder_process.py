"""What processes have in common that decode what strangers send: their parent, and refusals.

A process ends with its parent, however that ends, and says nothing to anybody else. Leaves out what
is decoded (``pictures``, ``videos``) and the parent's side (``era_vllm_server.decoders``).
"""

import ctypes
import logging
import signal
import socket
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


class RefusedError(Exception):
    """A picture or a video is not served; the text is for the client."""


def connected(control: int) -> socket.socket:
    """Return the parent's end of a process that is ready.

    Args:
        control: Of a socket that keeps the bounds of messages.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for ignored in (signal.SIGINT, signal.SIGTERM):  # to all, while the parent drains
        signal.signal(ignored, signal.SIG_IGN)
    logging.disable()
    parent = socket.socket(fileno=control)
    parent.send(b"{}")
    return parent
