"""What one worker counts: how long the reducer takes, how many images, how many repaired inputs.

Plain numbers, asked for when a server is scraped (``worker.py``): vLLM's own metrics stay in
whatever mode they are in, and nothing is written while a step runs. Neither a step nor a scrape
ever waits for a GPU: a pass leaves a pair of events and a copy of the model's counts under way, and
they are read once the GPU is past them. So a scrape may be a pass behind. Leaves out: the names on
``/metrics`` (``server``).
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Final, NamedTuple, TypedDict

import torch
from torch import Tensor

from era_vllm.types import DEGENERATE_KINDS, Degenerate

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


class _Launched(NamedTuple):
    """A pass that a GPU may still be at."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    degenerate: Tensor
    """[kinds] on the host: what is there once the GPU is past ``end``."""


class ReducerMetrics:
    """Passes of the reducer in one worker."""

    def __init__(self) -> None:
        self._passes = [0] * (len(BUCKETS_S) + 1)
        self._seconds = 0.0
        self._images = 0
        self._degenerate = [0] * DEGENERATE_KINDS
        self._launched: deque[_Launched] = deque()

    @contextmanager
    def timed(self, images: int, degenerate: Tensor) -> Iterator[None]:
        """Measure what is done, or launched on a GPU, within.

        A pass that raises counts with the time that it took, and with no image.

        Args:
            images: How many are reduced.
            degenerate: [kinds] int64: the model's counts so far, in the order of ``Degenerate``,
                where it runs; read behind the pass.
        """
        if degenerate.device.type != "cuda":
            started = perf_counter()
            try:
                yield
                self._images += images
            finally:
                self._count(perf_counter() - started, degenerate)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        try:
            yield
            self._images += images
        finally:
            copied = degenerate.to("cpu", non_blocking=True)  # pinned, so that nothing waits
            end.record()
            self._launched.append(_Launched(start, end, copied))
            self._collect()

    def counted(self) -> Counted:
        """Return the counts, without passes that a GPU is still at."""
        self._collect()
        kinds = zip(Degenerate, self._degenerate, strict=True)
        return {
            "seconds": self._seconds,
            "passes": list(self._passes),
            "images": self._images,
            "degenerate": {kind.name.lower(): count for kind, count in kinds},
        }

    def _collect(self) -> None:
        while self._launched and self._launched[0].end.query():
            start, end, degenerate = self._launched.popleft()
            self._count(start.elapsed_time(end) / 1e3, degenerate)

    def _count(self, seconds: float, degenerate: Tensor) -> None:
        self._seconds += seconds
        self._passes[bisect_left(BUCKETS_S, seconds)] += 1
        self._degenerate = degenerate.tolist()
