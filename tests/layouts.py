"""Layouts for the tests: unequal segments that interleave, separators, dropped places, runs."""

import torch
from hypothesis import strategies as st

from era_vllm.layout import Layout, SegmentLayout


@st.composite
def layouts(draw: st.DrawFn, *, most_runs: int = 3, shape: tuple[int, ...] = ()) -> Layout:
    """Return a layout; within a run the places of its segments and separators are shuffled."""
    segments: list[SegmentLayout] = []
    separators: list[int] = []
    lengths: list[int] = []
    for _ in range(draw(st.integers(1, most_runs))):
        grids = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), max_size=3))
        of_separators, dropped = draw(st.integers(0, 3)), draw(st.integers(0, 2))
        sizes = [rows * columns for rows, columns in grids]
        length = sum(sizes) + of_separators + dropped
        if not grids and not of_separators:
            continue  # no run of which nothing is kept
        first = sum(lengths)
        order = draw(st.permutations(range(first, first + length)))
        for grid, size in zip(grids, sizes, strict=True):
            places, order = sorted(order[:size]), order[size:]
            segments.append(SegmentLayout(grid, torch.tensor(places)))
        separators += sorted(order[:of_separators])
        lengths.append(length)
    if not lengths:
        return Layout(shape, 1, (SegmentLayout((1, 1), torch.tensor([0])),))
    return Layout(
        shape,
        sum(lengths),
        tuple(segments),
        torch.tensor(separators, dtype=torch.int64),
        run_lengths=tuple(lengths),
    )
