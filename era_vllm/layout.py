"""Where an item's visual tokens stand unpruned: segments, separators, runs, positions. No vllm.

An item is a picture or a video. Its layout is a pure function of its shape, a few integers that are
known before anything is encoded. The processor (how many placeholders), the model (which rows) and
the runner (which positions) call it with the same integers, so the three cannot disagree.

    place     index of a row of what vLLM's own encoder gives for the item: [length, d]
    segment   places that are pruned alone: a picture, a tile, a frame
    run       places without text between them in the prompt; all but some videos have one
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

import torch
from jaxtyping import Int
from torch import Tensor

NO_PLACES: Final = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True, eq=False)
class SegmentLayout:
    """Tokens that are pruned alone; never empty, and all in one run."""

    grid: tuple[int, int]
    """Rows and columns of its tokens."""
    places: Int[Tensor, "n"]
    """Their places in the item, raster order."""

    @property
    def n(self) -> int:
        """n, its visual tokens."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, eq=False)
class Layout:
    """One item as the language model would see it unpruned.

    Raises:
        ValueError: a segment without tokens, or runs that are not ``length`` places.
    """

    shape: tuple[int, ...]
    """What it was computed from; its meaning is the family's."""
    length: int
    """Rows of vLLM's own ``embed_multimodal`` for the item."""
    segments: tuple[SegmentLayout, ...]
    separators: Int[Tensor, "k"] = NO_PLACES
    """Places that are kept as they are, with bias 0 (newlines). Places in no segment either are
    dropped."""
    units: int = 1
    """Rows of the tower's batch: tiles, frames."""
    work: int = 0
    """Tokens that the tower makes for it, padding included; 0 = ``length``."""
    run_lengths: tuple[int, ...] = ()
    """Places of each run; () = one run."""
    offsets: Int[Tensor, "length p"] | None = None
    """Position of each place relative to its run's first, >= 0; None = its index in the run."""
    spans: tuple[int, ...] = ()
    """How far text moves on behind each run; () = its length."""

    def __post_init__(self) -> None:
        for segment in self.segments:
            if segment.n == 0 or segment.n != len(segment.places):
                raise ValueError(f"segment of {segment.grid} with {len(segment.places)} places")
        for name, value in (("work", self.length), ("run_lengths", (self.length,))):
            object.__setattr__(self, name, getattr(self, name) or value)
        object.__setattr__(self, "spans", self.spans or self.run_lengths)
        if sum(self.run_lengths) != self.length or len(self.spans) != len(self.run_lengths):
            raise ValueError(f"runs of {self.run_lengths} places, {self.length} in all")
        kept = {*self.run_of_segment, *(i for i, n in enumerate(self.by_run(self.separators)) if n)}
        if len(kept) != len(self.run_lengths):
            raise ValueError(f"runs of {self.run_lengths} places: nothing of one would be kept")

    @cached_property
    def position_offsets(self) -> Int[Tensor, "length p"]:
        """The offsets, also where they are indices."""
        if self.offsets is not None:
            return self.offsets
        return torch.cat([torch.arange(length) for length in self.run_lengths])[:, None]

    @cached_property
    def run_of_segment(self) -> tuple[int, ...]:
        """The run in which each segment is."""
        first = torch.tensor([int(one.places[0]) for one in self.segments], dtype=torch.int64)
        return tuple(map(int, self._runs(first)))

    @cached_property
    def outside(self) -> Int[Tensor, "k"]:
        """Places in no segment, those of the separators among them."""
        inside = torch.zeros(self.length, dtype=torch.bool)
        for segment in self.segments:
            inside[segment.places] = True
        return (~inside).nonzero()[:, 0]

    def by_run(self, places: Int[Tensor, "k"]) -> list[int]:
        """Return how many of these places each run has."""
        return [*map(int, self._runs(places).bincount(minlength=len(self.run_lengths)))]

    def _runs(self, places: Int[Tensor, "k"]) -> Int[Tensor, "k"]:
        ends = torch.tensor(self.run_lengths).cumsum(0)
        return torch.searchsorted(ends, places, right=True)


@lru_cache(maxsize=256)
def one_grid(rows: int, columns: int, shape: tuple[int, ...]) -> Layout:
    """Return the layout of an item that is one segment and nothing else."""
    segment = SegmentLayout((rows, columns), torch.arange(rows * columns))
    return Layout(shape, rows * columns, (segment,))


@lru_cache(maxsize=256)
def equal_units(
    grid: tuple[int, int],
    units: int,
    shape: tuple[int, ...],
    *,
    work: int,
    separators: int = 0,
    runs: bool = False,
) -> Layout:
    """Return the layout of tiles or frames of one size, a segment each, one after another.

    Args:
        grid: Rows and columns of a unit's tokens.
        units: How many there are.
        work: Tokens that the tower makes of a unit.
        separators: Rows behind the last unit.
        runs: Text stands between the units.
    """
    n = grid[0] * grid[1]
    length = units * n + separators
    return Layout(
        shape,
        length,
        tuple(SegmentLayout(grid, torch.arange(unit * n, unit * n + n)) for unit in range(units)),
        torch.arange(units * n, length),
        units=units,
        work=units * work,
        run_lengths=(n,) * units if runs else (),
    )
