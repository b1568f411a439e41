"""Passes through the encoder: bounded, whole items, in order, and each with its share of inputs."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from era_vllm.contracts import ModelAdapter
from era_vllm.layout import Layout, SegmentLayout
from era_vllm.plan import Plan
from era_vllm.vllm_plugin.encoder_pass import cuts, encoded, passes
from era_vllm.vllm_plugin.fields import Planned


class Tiles(ModelAdapter):
    """Tiles of all items lie in one row."""

    def input_rows(self, layout: Layout) -> Mapping[str, int]:
        """As many as the item has."""
        return {"tiles": layout.units}


def item(units: int, work: int) -> Planned:
    """Return an item of one token a tile."""
    segment = SegmentLayout((1, units), torch.arange(units))
    return Planned(Plan(Layout((), units, (segment,), units=units, work=work), (1,)), 0)


@given(work=st.lists(st.integers(1, 50), max_size=12), budget=st.integers(1, 80))
def test_parts_are_whole_in_order_and_bounded(work: list[int], budget: int) -> None:
    parts = cuts(work, budget)
    assert [index for part in parts for index in range(part.start, part.stop)] == [
        *range(len(work))
    ]
    for part in parts:
        assert part.stop > part.start
        assert sum(work[part]) <= budget or part.stop - part.start == 1


@given(units=st.lists(st.integers(1, 5), min_size=1, max_size=8), budget=st.integers(1, 9))
def test_shares_of_all_passes_are_the_whole(units: list[int], budget: int) -> None:
    items = [item(count, count) for count in units]
    inputs = {
        "tiles": torch.arange(sum(units)),
        "sizes": torch.arange(len(units)),
        "names": [str(index) for index in range(len(units))],
        "flag": True,
        "scalar": torch.tensor(3),
    }
    found = list(passes(Tiles(), items, inputs, budget))
    assert [one for of_pass, _ in found for one in of_pass] == items
    for name in ("tiles", "sizes"):
        assert torch.equal(torch.cat([share[name] for _, share in found]), inputs[name])
    assert [name for _, share in found for name in share["names"]] == inputs["names"]
    for of_pass, share in found:
        assert len(share["tiles"]) == sum(one.plan.layout.units for one in of_pass)
        assert share["flag"] is True and share["scalar"] is inputs["scalar"]


def test_an_encoder_that_gives_other_rows_than_the_layout_is_a_fault() -> None:
    items = [item(2, 2), item(3, 3)]
    with pytest.raises(ValueError, match="gave 2 rows, its layout has 3"):
        encoded(items, [torch.zeros(2, 4), torch.zeros(2, 4)], {})
