"""The greedy searches against brute force: distances over the chosen set, determinants."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from era_vllm.steps.search import dpp_map, farthest_first
from era_vllm.steps.similarity import gram, unit
from era_vllm.types import VisualTokens
from tests import oracle
from tests.strategies import build, generic


def _farthest_by_hand(
    similarity: oracle.Array, penalty: oracle.Array, count: int, multiplicative: bool
) -> tuple[list[int], float]:
    """Anchors, and by how little a choice was made."""
    chosen, margin = [int(penalty.argmin())], float(np.diff(np.sort(penalty))[0])
    while len(chosen) < count:
        distance = 1 - similarity[:, chosen].max(axis=1)
        score = distance * (1 - penalty) if multiplicative else distance - penalty
        free = [token for token in range(len(score)) if token not in chosen]
        ranked = sorted(free, key=lambda token: -score[token])
        if len(ranked) > 1:
            margin = min(margin, float(score[ranked[0]] - score[ranked[1]]))
        chosen.append(ranked[0])
    return sorted(chosen), margin


@given(drawn=generic(), multiplicative=st.booleans(), data=st.data())
def test_farthest_first_matches_brute_force(
    drawn: tuple[VisualTokens, int], multiplicative: bool, data: st.DataObject
) -> None:
    tokens, count = drawn
    similarity = gram(unit(tokens.embeds))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    penalty = torch.from_numpy(rng.random((1, tokens.n))).float()
    expected, margin = _farthest_by_hand(
        similarity[0].double().numpy(), penalty[0].double().numpy(), count, multiplicative
    )
    assume(margin > 1e-5)
    found = farthest_first(similarity, penalty, count, multiplicative=multiplicative)
    assert found.tolist() == [expected]


def test_penalty_decides_between_equal_distances() -> None:
    """Four corners of a square: the start is the least penalised, then the opposite corner."""
    corners = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]])
    similarity = gram(unit(corners))
    penalty = torch.tensor([[0.3, 0.0, 0.2, 0.1]])
    picks = [farthest_first(similarity, penalty, count).tolist()[0] for count in (1, 2, 3, 4)]
    assert picks == [[1], [1, 3], [1, 2, 3], [0, 1, 2, 3]]


@given(drawn=generic(least=3), data=st.data())
def test_dpp_adds_the_largest_determinant(
    drawn: tuple[VisualTokens, int], data: st.DataObject
) -> None:
    tokens, count = drawn
    count = min(count, 12)
    first = data.draw(st.integers(0, tokens.n - 1))
    kernel = gram(unit(tokens.embeds)) + 0.1 * torch.eye(tokens.n)
    expected = oracle.greedy_log_det(kernel[0].double().numpy(), first, count)
    assume(expected.margin > 1e-4)
    assert dpp_map(kernel, torch.tensor([first]), count)[0].tolist() == expected.anchors.tolist()


def test_dpp_takes_the_lowest_index_where_gains_differ_by_rounding() -> None:
    gain = 1 + torch.arange(4) * torch.finfo(torch.float32).eps
    assert dpp_map(gain.diag()[None], torch.tensor([3]), 2).tolist() == [[0, 3]]


@pytest.mark.parametrize("ridge", [1e-30, 1e-9, 1e-6, 1e-3])
def test_dpp_stays_sound_when_the_kernel_is_spent(ridge: float) -> None:
    """Rank 2 and every token twice: from the third anchor on only rounding noise is left."""
    x = torch.randn(3, 100, 2, generator=torch.Generator().manual_seed(0)).repeat(1, 2, 1)
    kernel = gram(unit(x)) + ridge * torch.eye(200)
    anchors = dpp_map(kernel, torch.zeros(3, dtype=torch.int64), 199)
    assert (anchors.diff(dim=1) > 0).all() and (anchors < 200).all()


@pytest.mark.parametrize("search", ["farthest", "dpp"])
def test_every_number_of_anchors_adds_one_to_the_last(search: str) -> None:
    similarity = gram(
        unit(build(8, (4, 7), kinds=(("generic", "flat"), ("lattice", "flat"))).embeds)
    )

    def pick(count: int) -> Tensor:
        if search == "farthest":
            return farthest_first(similarity, torch.zeros(2, 28), count)
        return dpp_map(similarity + 0.1 * torch.eye(28), torch.tensor([3, 4]), count)

    before = [set[int]()] * 2
    for count in range(1, 29):
        now = [set(map(int, row)) for row in pick(count)]
        assert all(
            len(more) == count and less < more for less, more in zip(before, now, strict=True)
        )
        before = now


def test_large_segments_are_searched_alike_and_know_no_neighbour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    similarity = gram(unit(torch.randn(3, 60, 16, generator=torch.Generator().manual_seed(4))))
    kernel, first = similarity + 0.1 * torch.eye(60), torch.tensor([7, 0, 59])
    expected = dpp_map(kernel, first, 40)
    monkeypatch.setattr("era_vllm.steps.search._LARGE", 100)
    assert torch.equal(dpp_map(kernel, first, 40), expected)
    for one in range(3):
        alone = dpp_map(kernel[one : one + 1], first[one : one + 1], 40)
        assert torch.equal(alone[0], expected[one])
    assert set(dpp_map(kernel, first, 20)[0].tolist()) < set(expected[0].tolist())
