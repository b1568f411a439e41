"""What vLLM's engine and data-parallel coordinator run, and what their first process waits for.

Plugins come too late there: an engine loads them when it has found the one who started it, for
which it waits 5 minutes, and a coordinator has none.

Upstream: vllm/v1/engine/utils.py:282, vllm/v1/engine/coordinator.py:104 and
vllm/entrypoints/cli/serve.py:386 (0.32.0).
Private use: the functions are replaced in the process that starts the others.
Remove when: vLLM's processes end with their parents, and its server within seconds of a failure.
"""

import sys
from collections.abc import Callable
from typing import Any, Final

from vllm.v1.engine.coordinator import DPCoordinatorProc
from vllm.v1.engine.core import EngineCoreProc

ENGINE: Final[Callable[..., None]] = EngineCoreProc.run_engine_core
COORDINATOR: Final[Callable[..., None]] = DPCoordinatorProc.run_coordinator


_SERVE: Final = "vllm.entrypoints.cli.serve"


def replace(engine: Callable[..., None], coordinator: Callable[..., None]) -> None:
    """Have functions of a module called in place of both."""
    EngineCoreProc.run_engine_core = staticmethod(engine)
    DPCoordinatorProc.run_coordinator = staticmethod(coordinator)


def on_failure(failed: Callable[[], None]) -> None:
    """Have a function called where a server of several processes has lost one; once is enough.

    Nothing where this process runs no such server.
    """
    if (serve := sys.modules.get(_SERVE)) is None:
        return
    wait: Callable[..., None] = serve.wait_for_completion_or_failure

    def waiting(*arguments: Any, **named: Any) -> None:  # noqa: ANN401  # vLLM's
        try:
            wait(*arguments, **named)
        except Exception:  # whichever way vLLM says that one is lost; it goes on to the caller
            failed()
            raise

    serve.wait_for_completion_or_failure = waiting
