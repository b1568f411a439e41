"""vLLM's coordinator of data-parallel engines: the one process of a server without plugins.

Upstream: vllm/v1/engine/coordinator.py:104 starts ``DPCoordinatorProc.run_coordinator`` (0.32.0).
Private use: that function is replaced in the process that starts it, which sends it by its name.
Remove when: vLLM's processes end with their parents, or the coordinator loads general plugins.
"""

from collections.abc import Callable
from typing import Final

from vllm.v1.engine.coordinator import DPCoordinatorProc

ORIGINAL: Final[Callable[..., None]] = DPCoordinatorProc.run_coordinator


def replace(run: Callable[..., None]) -> None:
    """Have ``run``, a function of a module, called in the coordinator's process."""
    DPCoordinatorProc.run_coordinator = staticmethod(run)
