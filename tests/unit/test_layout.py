"""Layouts and plans: what they refuse, and that K of a run follows from sizes alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from era_vllm.config import EraConfig
from era_vllm.layout import WHOLE, Layout, SegmentLayout, block_counts, cut, equal_units, one_grid
from era_vllm.plan import plan
from tests.layouts import layouts


def test_an_item_of_one_grid() -> None:
    found = one_grid(3, 4, (9, 9))
    (segment,) = found.segments
    assert (segment.grid, segment.n, segment.places.tolist()) == ((3, 4), 12, list(range(12)))
    assert (found.shape, found.length, found.work, found.run_lengths) == ((9, 9), 12, 12, (12,))
    assert found.spans == (12,) and found.by_run(found.separators) == [0]
    assert found.position_offsets.tolist() == [[i] for i in range(12)]
    assert one_grid(3, 4, (9, 9)) is found


def test_what_is_no_layout_is_refused() -> None:
    places = torch.arange(4)
    with pytest.raises(ValueError, match=r"segment of \(2, 3\) with 4 places"):
        Layout((), 4, (SegmentLayout((2, 3), places),))
    with pytest.raises(ValueError, match=r"segment of \(0, 3\) with 0 places"):
        Layout((), 4, (SegmentLayout((0, 3), places[:0]),))
    segment = SegmentLayout((2, 2), places)
    with pytest.raises(ValueError, match="4 in all"):
        Layout((), 4, (segment,), run_lengths=(3, 2))
    with pytest.raises(ValueError, match="4 in all"):
        Layout((), 4, (segment,), run_lengths=(2, 2), spans=(4,))
    with pytest.raises(ValueError, match="nothing of one would be kept"):
        Layout((), 6, (segment,), run_lengths=(4, 2))


@given(layout=layouts(), rate=st.floats(0, 0.99))
def test_what_stays_of_each_run(layout: Layout, rate: float) -> None:
    config = EraConfig()
    found = plan(layout, rate, config)
    for segment, count in zip(layout.segments, found.num_anchors, strict=True):
        assert 1 <= count <= segment.n and count == config.num_anchors(segment.n, rate)
    full = list(found.num_anchors) == [segment.n for segment in layout.segments]
    taken = {int(place) for segment in layout.segments for place in segment.places}
    outside = [place for place in range(layout.length) if place not in taken]
    others = outside if full else layout.separators.tolist()
    assert found.separators.tolist() == others, "where nothing is pruned nothing is dropped"
    start = 0
    for length, kept in zip(layout.run_lengths, found.kept, strict=True):
        inside = range(start, start + length)
        expected = sum(place in inside for place in others)
        for segment, count in zip(layout.segments, found.num_anchors, strict=True):
            of_run = [place in inside for place in segment.places.tolist()]
            assert all(of_run) or not any(of_run)
            expected += count if of_run[0] else 0
        assert kept == expected
        start += length


@given(layout=layouts())
def test_offsets_start_anew_in_each_run(layout: Layout) -> None:
    expected = [index for length in layout.run_lengths for index in range(length)]
    assert layout.position_offsets[:, 0].tolist() == expected
    assert layout.spans == layout.run_lengths


def test_units_of_one_size_one_after_another() -> None:
    frames = equal_units((2, 3), 4, (4,), work=24, separators=1)
    assert (frames.length, frames.units, frames.work) == (25, 4, 96)
    assert [segment.places[0].item() for segment in frames.segments] == [0, 6, 12, 18]
    assert frames.separators.tolist() == frames.outside.tolist() == [24]
    runs = equal_units((2, 3), 4, (4,), work=6, runs=True)
    assert (runs.length, runs.run_lengths, runs.run_of_segment) == (24, (6,) * 4, (0, 1, 2, 3))
    assert not len(runs.outside)


SIDES = st.integers(1, 200)


@given(rows=SIDES, columns=SIDES, most=st.integers(16, 5000))
def test_blocks_of_a_grid(rows: int, columns: int, most: int) -> None:
    whole = one_grid(rows, columns, (1,))
    found = cut(whole, most)
    if rows * columns <= most:
        assert found is whole
        return
    places = torch.cat([block.places for block in found.segments])
    assert torch.equal(places.sort().values, torch.arange(whole.length)), "each place once"
    least = -(-rows * columns // most)
    assert len(found.segments) <= 2 * least or min(rows, columns) < (most / 2) ** 0.5
    for block in found.segments:
        (height, width), (top, left, bottom, right) = block.grid, block.box
        assert block.n == height * width <= most
        assert (block.places.diff() > 0).all(), "raster order"
        assert block.places.view(block.grid)[:, 0].diff().eq(columns).all()
        first = divmod(int(block.places[0]), columns)
        expected = (first[0], first[1], first[0] + height, first[1] + width)
        shares = (top * rows, left * columns, bottom * rows, right * columns)
        assert shares == pytest.approx(expected), "its box is where it stands"
        assert (block.unit, block.units) == (0, 1)


@given(rows=SIDES, columns=SIDES, most=st.integers(16, 5000))
def test_blocks_are_near_square_wherever_the_grid_allows(
    rows: int, columns: int, most: int
) -> None:
    """It does where it is at least as high and wide as half a square block is."""
    high, wide = block_counts((rows, columns), most)
    allowed = [
        (r, c)
        for r in range(1, rows + 1)
        for c in range(1, columns + 1)
        if -(-rows // r) * -(-columns // c) <= most
        and r * c <= 2 * -(-rows * columns // most)
        and _aspect(rows, columns, r, c) <= 2
    ]
    assert -(-rows // high) * -(-columns // wide) <= most
    if allowed:
        assert _aspect(rows, columns, high, wide) <= 2
        assert high * wide == min(r * c for r, c in allowed)
    if rows * columns > most and min(rows, columns) ** 2 >= 2 * most:
        assert allowed, "of a grid wider than a block is long"


def _aspect(rows: int, columns: int, high: int, wide: int) -> float:
    tall, broad = ({side // n, -(-side // n)} for side, n in ((rows, high), (columns, wide)))
    return max(max(a / b, b / a) for a in tall for b in broad)


@pytest.mark.parametrize(
    ("grid", "most", "counts"),
    [
        ((128, 128), 1024, (4, 4)),
        ((128, 128), 4096, (2, 2)),
        ((64, 64), 2048, (1, 2)),
        ((60, 68), 1024, (2, 2)),
        ((33, 32), 1024, (2, 1)),
        ((1, 5000), 1024, (1, 5)),
        ((24, 24), 576, (1, 1)),
    ],
)
def test_blocks_by_example(grid: tuple[int, int], most: int, counts: tuple[int, int]) -> None:
    assert block_counts(grid, most) == counts


@given(layout=layouts(), most=st.integers(1, 20), frames=st.integers(1, 3))
def test_a_cut_layout_keeps_everything_else(layout: Layout, most: int, frames: int) -> None:
    found = cut(layout, most, frames)
    assert cut(layout, most, frames) is found
    if all(segment.n <= most for segment in layout.segments) and frames == 1:
        assert found is layout
    for name in ("shape", "length", "units", "work", "run_lengths", "spans"):
        assert getattr(found, name) == getattr(layout, name)
    assert torch.equal(found.separators, layout.separators)
    assert torch.equal(found.position_offsets, layout.position_offsets)
    assert torch.equal(found.outside, layout.outside)
    assert all(segment.n <= most for segment in found.segments)
    assert sum(s.n for s in found.segments) == sum(s.n for s in layout.segments)


@given(
    frames=st.integers(1, 20),
    together=st.integers(1, 6),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    most=st.integers(16, 120),
)
def test_frames_of_one_run_are_joined(
    frames: int, together: int, grid: tuple[int, int], most: int
) -> None:
    layout = equal_units(grid, frames, (frames,), work=9, separators=1)
    found = cut(layout, most, together)
    at_once = max(1, min(together, most // (grid[0] * grid[1])))
    expected = [at_once] * (frames // at_once) + [frames % at_once] * (frames % at_once > 0)
    if grid[0] * grid[1] <= most:
        assert [one.units for one in found.segments] == expected
        assert [one.grid for one in found.segments] == [(c * grid[0], grid[1]) for c in expected]
        assert all(one.box == WHOLE for one in found.segments)
        starts = [sum(expected[:i]) for i in range(len(expected))]
        assert [one.unit for one in found.segments] == starts
    places = torch.cat([one.places for one in found.segments])
    assert places.tolist() == list(range(layout.length - 1)) or grid[0] * grid[1] > most
    apart = equal_units(grid, frames, (frames,), work=9, runs=True)
    assert [s.units for s in cut(apart, most, together).segments] == [1] * len(
        cut(apart, most).segments
    ), "text stands between them"


def test_k_follows_from_the_tokens_of_the_joined_frames() -> None:
    layout = cut(equal_units((3, 3), 5, (5,), work=9, separators=1), 64, 2)
    assert [segment.n for segment in layout.segments] == [18, 18, 9]
    assert plan(layout, 0.75, EraConfig()).num_anchors == (5, 5, 2)


def test_a_part_of_a_tile_is_boxed_within_what_the_tile_shows() -> None:
    box = (0.25, 0.0, 1.0, 0.5)
    layout = Layout((), 32, (SegmentLayout((4, 8), torch.arange(32), 3, box),))
    left, right = cut(layout, 16).segments
    assert (left.unit, left.box, left.grid) == (3, (0.25, 0.0, 1.0, 0.25), (4, 4))
    assert (right.unit, right.box) == (3, (0.25, 0.25, 1.0, 0.5))
    assert right.places.tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31]
