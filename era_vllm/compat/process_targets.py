"""What vLLM's engine and data-parallel coordinator run: the first code of ours in their processes.

Plugins come too late there: an engine loads them when it has found the one who started it, for
which it waits 5 minutes, and a coordinator has none.

Upstream: vllm/v1/engine/utils.py:282 and vllm/v1/engine/coordinator.py:104 (0.32.0).
Private use: both functions are replaced in the process that starts them, which sends their names.
Remove when: vLLM's processes end with their parents.
"""

from collections.abc import Callable
from typing import Final

from vllm.v1.engine.coordinator import DPCoordinatorProc
from vllm.v1.engine.core import EngineCoreProc

ENGINE: Final[Callable[..., None]] = EngineCoreProc.run_engine_core
COORDINATOR: Final[Callable[..., None]] = DPCoordinatorProc.run_coordinator


def replace(engine: Callable[..., None], coordinator: Callable[..., None]) -> None:
    """Have functions of a module called in place of both."""
    EngineCoreProc.run_engine_core = staticmethod(engine)
    DPCoordinatorProc.run_coordinator = staticmethod(coordinator)
