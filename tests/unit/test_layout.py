"""Layouts and plans: what they refuse, and that K of a run follows from sizes alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from era_vllm.config import EraConfig
from era_vllm.layout import Layout, SegmentLayout, equal_units, one_grid
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
