"""Where an item's visual tokens stand unpruned: segments, separators, runs, positions. No vllm.

An item is a picture or a video. Its layout is a pure function of its shape, a few integers that are
known before anything is encoded. The processor (how many placeholders), the model (which rows) and
the runner (which positions) call it with the same integers, so the three cannot disagree.

    place     index of a row of what vLLM's own encoder gives for the item: [length, d]
    segment   places that are pruned alone: a picture, a tile, a frame; ``cut`` makes blocks of a
              large one, and one of several frames
    run       places without text between them in the prompt; all but some videos have one
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Final

import torch
from jaxtyping import Int
from torch import Tensor

NO_PLACES: Final = torch.zeros(0, dtype=torch.int64)
WHOLE: Final = (0.0, 0.0, 1.0, 1.0)
"""Box of a segment that shows all of its unit."""


@dataclass(frozen=True, slots=True, eq=False)
class SegmentLayout:
    """Tokens that are pruned alone; never empty, and all in one run."""

    grid: tuple[int, int]
    """Rows and columns of its tokens."""
    places: Int[Tensor, "n"]
    """Their places in the item, raster order."""
    unit: int = 0
    """Row of the tower's batch whose pixels they show."""
    box: tuple[float, float, float, float] = WHOLE
    """Top, left, bottom and right of what they show of the unit, in its own height and width."""
    units: int = 1
    """Rows of the batch, from ``unit`` on, of which the segment is all, one above another."""

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
        tuple(
            SegmentLayout(grid, torch.arange(unit * n, unit * n + n), unit) for unit in range(units)
        ),
        torch.arange(units * n, length),
        units=units,
        work=units * work,
        run_lengths=(n,) * units if runs else (),
    )


@lru_cache(maxsize=256)
def cut(layout: Layout, max_segment: int, frames: int = 1) -> Layout:
    """Return a layout of which no segment has more than ``max_segment`` tokens.

    A larger one becomes near-square blocks. All else stays, and so does a layout, the same object,
    in which there is nothing to do.

    Args:
        max_segment: >= 1.
        frames: So many segments become one where they are whole units of one grid that follow one
            another in one run; fewer where more would be too large, and at the end.
    """
    joined = _joined(layout, max_segment, frames) if frames > 1 else layout.segments
    segments = tuple(block for one in joined for block in _blocks(one, max_segment))
    return layout if segments == layout.segments else replace(layout, segments=segments)


def _joined(layout: Layout, max_segment: int, frames: int) -> Sequence[SegmentLayout]:
    groups: list[list[SegmentLayout]] = []
    last_run = -1
    for segment, run in zip(layout.segments, layout.run_of_segment, strict=True):
        group = groups[-1] if groups and run == last_run else []
        at_once = min(frames, max_segment // segment.n)
        if group and len(group) < at_once and _follows(segment, group[-1]):
            group.append(segment)
        else:
            groups.append([segment])
        last_run = run
    return [_stacked(group) for group in groups]


def _follows(segment: SegmentLayout, before: SegmentLayout) -> bool:
    whole = segment.box == before.box == WHOLE and segment.units == before.units == 1
    return whole and segment.grid == before.grid and segment.unit == before.unit + 1


def _stacked(group: Sequence[SegmentLayout]) -> SegmentLayout:
    if len(group) == 1:
        return group[0]
    (rows, columns), first = group[0].grid, group[0].unit
    places = torch.cat([segment.places for segment in group])
    return SegmentLayout((len(group) * rows, columns), places, first, WHOLE, len(group))


def _blocks(segment: SegmentLayout, max_segment: int) -> Iterator[SegmentLayout]:
    """Yield the blocks of a segment, row by row of them; one of few tokens is its own."""
    if segment.n <= max_segment:
        yield segment
        return
    bands = block_counts(segment.grid, max_segment)
    places = segment.places.view(segment.grid)
    top, left, bottom, right = segment.box
    tall, wide = (bottom - top) / segment.grid[0], (right - left) / segment.grid[1]
    ends = [
        [side * i // count for i in range(count + 1)]
        for side, count in zip(segment.grid, bands, strict=True)
    ]
    for upper, lower in pairwise(ends[0]):
        for first, last in pairwise(ends[1]):
            box = top + upper * tall, left + first * wide, top + lower * tall, left + last * wide
            size, own = (lower - upper, last - first), places[upper:lower, first:last]
            yield SegmentLayout(size, own.flatten(), segment.unit, box, segment.units)


@lru_cache(maxsize=256)
def block_counts(grid: tuple[int, int], max_segment: int) -> tuple[int, int]:
    """Return the rows and columns of blocks that a grid is cut into, equal to a row and column.

    The fewest blocks of which none is more than twice as long as wide, where twice the least
    number is enough for that, as it is but for thin grids; else the fewest. Of as many blocks the
    squarest, and of these the fewest rows.

    Args:
        grid: Rows and columns of tokens.
        max_segment: Tokens of a block, at most; >= 1.
    """
    (height, width), enough = grid, 2 * -(-grid[0] * grid[1] // max_segment)
    found: list[tuple[bool, int, float, int, int]] = []
    for rows in range(1, height + 1):
        if not (widest := max_segment // -(-height // rows)):
            continue
        fewest = -(-width // widest)
        for columns in range(fewest, max(fewest, min(width, enough // rows)) + 1):
            sides = (-(-height // rows), height // rows), (-(-width // columns), width // columns)
            aspect = max(sides[0][0] / sides[1][1], sides[1][0] / sides[0][1])
            near_square = aspect <= 2 and rows * columns <= enough
            found.append((not near_square, rows * columns, aspect, rows, columns))
    return min(found)[3:]
