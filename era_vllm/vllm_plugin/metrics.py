"""What one worker counts: how long the reducer takes, how many images it is given.

Plain numbers, asked for when a server is scraped (``worker.py``): vLLM's own metrics stay in
whatever mode they are in, and nothing is written while a step runs. A step never waits for a GPU:
durations are pairs of events, read once the GPU is past them. Leaves out: repaired inputs, which
the model counts (``PrunedModelMixin.degenerate``); the names on ``/metrics`` (``server``).
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Final, TypedDict

import torch
from torch import Tensor

from era_vllm.types import Degenerate

BUCKETS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of the histogram, seconds; one more bucket is open."""


class Counted(TypedDict):
    """A worker's counts since it started, as plain values for the way to another process."""

    seconds: float
    """Spent in the reducer, over all its passes."""
    passes: list[int]
    """Passes of the reducer in each bucket, each counted once; one that raised is among them."""
    images: int
    """Images that were encoded and reduced; one that a cache answers is not, nor one of a pass that
    raised."""
    degenerate: dict[str, int]
    """Values that were repaired, by kind."""


class ReducerMetrics:
    """Passes of the reducer in one worker."""

    def __init__(self) -> None:
        self._passes = [0] * (len(BUCKETS_S) + 1)
        self._seconds = 0.0
        self._images = 0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def timed(self, images: int, device: torch.device) -> Iterator[None]:
        """Measure what is done, or launched on a GPU, within.

        A pass that raises counts with the time that it took, and with no image.

        Args:
            images: How many are reduced.
            device: Where.
        """
        if device.type != "cuda":
            started = perf_counter()
            try:
                yield
                self._images += images
            finally:
                self._count(perf_counter() - started)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        try:
            yield
            self._images += images
        finally:
            end.record()
            self._running.append((start, end))
            self._collect()

    def counted(self, degenerate: Tensor) -> Counted:
        """Return the counts; waits for a GPU, so not for use within a step.

        Args:
            degenerate: [kinds], in the order of ``Degenerate``.
        """
        self._collect(wait=True)
        kinds = zip(Degenerate, degenerate.tolist(), strict=True)
        return {
            "seconds": self._seconds,
            "passes": list(self._passes),
            "images": self._images,
            "degenerate": {kind.name.lower(): count for kind, count in kinds},
        }

    def _collect(self, *, wait: bool = False) -> None:
        while self._running:
            start, end = self._running[0]
            if wait:
                end.synchronize()
            elif not end.query():
                return
            self._running.popleft()
            self._count(start.elapsed_time(end) / 1e3)

    def _count(self, seconds: float) -> None:
        self._seconds += seconds
        self._passes[bisect_left(BUCKETS_S, seconds)] += 1
