"""Scores stretched and ranked: ties to the lowest index, noise to nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from era_vllm.steps.ranking import others, ranked, stretched, top

SCORES = st.lists(st.integers(-3, 3), min_size=2, max_size=12)


@given(scores=SCORES, data=st.data())
def test_the_first_of_equal_scores_come_first(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    score = torch.tensor([scores], dtype=torch.float32)
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    assert ranked(score).tolist() == [order]
    assert top(score, count).tolist() == [sorted(order[:count])]
    left = sorted(set(range(len(scores))) - set(order[:count]))
    assert others(ranked(score)[:, :count], len(scores)).tolist() == [left]


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 1e30])
def test_the_range_is_0_to_1_whatever_it_was(scale: float) -> None:
    score = torch.tensor([[1.0, 3.0, 2.0], [-1.0, -1.0, -2.0]]) * scale
    assert stretched(score).tolist() == [[0.0, 1.0, 0.5], [1.0, 1.0, 0.0]]


def test_rounding_of_equal_values_is_no_range() -> None:
    equal = torch.full((1, 5), 1 / 577)
    noisy = equal * (1 + torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0]) * 2**-23)
    assert noisy.unique().numel() > 1
    assert not stretched(noisy).any() and not stretched(torch.zeros(1, 5)).any()
    assert stretched(equal * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.001])).max() == 1
