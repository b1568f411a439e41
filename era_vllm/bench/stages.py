"""Time spent inside modules of a model while it runs: forward hooks, nothing replaced in a class.

On a GPU the marks are CUDA events, so nothing waits; on a CPU they are clock readings. Modules in a
compiled or captured graph do not call their hooks: such a stage has no spans.
"""

import time
from collections.abc import Callable
from functools import wraps

import torch
from torch import nn

Mark = float | torch.cuda.Event


class StageClock:
    """Spans of named stages since the last ``take``."""

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._open: dict[str, Mark] = {}
        self._spans: dict[str, list[tuple[Mark, Mark]]] = {}

    def watch(self, stage: str, module: nn.Module) -> None:
        """Time every call of a module; a stage may have several modules, one after the other."""
        module.register_forward_pre_hook(lambda *_: self._begin(stage), prepend=True)
        module.register_forward_hook(lambda *_: self._end(stage))

    def watch_hooks(self, stage: str, module: nn.Module) -> None:
        """Time the pre-hooks that a module already has: first and last of them are ours."""
        module.register_forward_pre_hook(lambda *_: self._begin(stage), prepend=True)
        module.register_forward_pre_hook(lambda *_: self._end(stage))

    def watch_method(self, stage: str, owner: nn.Module, name: str) -> None:
        """Time a method of one object; Mutates: the object's own attribute of that name."""
        method: Callable[..., object] = getattr(owner, name)

        @wraps(method)
        def timed(*positional: object, **named: object) -> object:
            self._begin(stage)
            result = method(*positional, **named)
            self._end(stage)
            return result

        setattr(owner, name, timed)

    def take(self) -> dict[str, list[float]]:
        """Return the seconds of each span by stage, in order, and forget them."""
        if self._cuda:
            torch.cuda.synchronize()
        spans, self._spans = self._spans, {}
        return {stage: [_between(*span) for span in found] for stage, found in spans.items()}

    def _begin(self, stage: str) -> None:
        self._open[stage] = self._mark()

    def _end(self, stage: str) -> None:
        self._spans.setdefault(stage, []).append((self._open.pop(stage), self._mark()))

    def _mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        return float(end) - float(begin)  # type: ignore[arg-type]  # both are readings
    return begin.elapsed_time(end) / 1000
