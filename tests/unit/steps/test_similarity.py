"""Unit rows, Gram matrix and nearest anchor, against float64 and at the edges of the range."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from era_vllm.steps.similarity import gram, length, nearest_anchor, quantize, unit
from era_vllm.types import VisualTokens
from tests.strategies import build, generic


@given(drawn=generic(), factor=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_unit_rows_match_float64(drawn: tuple[VisualTokens, int], factor: float) -> None:
    x = drawn[0].embeds * factor
    rows = unit(x)[0].numpy()
    wide = x[0].double().numpy()
    expected = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    np.testing.assert_allclose(rows[:, : x.shape[-1]], expected, atol=3e-7)


@pytest.mark.parametrize("d", [1, 15, 16, 17, 32])
def test_rows_are_padded_to_whole_64_bytes_with_zeros(d: int) -> None:
    rows = unit(torch.ones(2, 3, d))
    assert rows.shape[-1] == -(-d // 16) * 16 and not rows[..., d:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unit_of_zero_is_zero_and_of_the_largest_is_one(dtype: torch.dtype) -> None:
    top, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    rows = unit(torch.tensor([[[0.0, 0.0], [top, 0.0], [-top, -top], [tiny, tiny]]], dtype=dtype))
    root = 0.5**0.5
    expected = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [-root, -root], [root, root]]])
    torch.testing.assert_close(rows[..., :2], expected, rtol=0, atol=1e-6)


@given(seed=st.integers(0, 2**32 - 1))
def test_equal_tokens_have_equal_rows_in_the_gram_matrix(seed: int) -> None:
    tokens = build(seed, (5, 9), d=11, kinds=(("twins", "flat"),) * 3)
    similarity = gram(unit(tokens.embeds))
    for x, matrix in zip(tokens.embeds, similarity, strict=True):
        _, label = x.unique(dim=0, return_inverse=True)
        first = torch.tensor([int((label == value).nonzero()[0]) for value in label])
        assert torch.equal(matrix, matrix[first]) and torch.equal(matrix, matrix[:, first])
        assert torch.equal(matrix.diagonal(), torch.ones(45))


@given(drawn=generic(), matching=st.sampled_from(["cosine", "dot"]), data=st.data())
def test_nearest_anchor_matches_brute_force(
    drawn: tuple[VisualTokens, int], matching: str, data: st.DataObject
) -> None:
    tokens, count = drawn
    order = data.draw(st.permutations(range(tokens.n)))
    anchors = sorted(order[:count])
    x = tokens.embeds[0].double().numpy()
    own = x / np.linalg.norm(x, axis=1, keepdims=True)
    score = own @ (own if matching == "cosine" else x)[anchors].T
    ranked = np.sort(score / np.abs(score).max(), axis=1)
    assume(count == 1 or (ranked[:, -1] - ranked[:, -2]).min() > 1e-5)
    expected = score.argmax(1)
    expected[anchors] = range(count)
    lengths = length(tokens.embeds) if matching == "dot" else None
    found = nearest_anchor(unit(tokens.embeds), torch.tensor([anchors]), lengths)
    assert found[0].tolist() == expected.tolist()


def test_an_anchor_that_another_equals_keeps_itself() -> None:
    x = unit(torch.tensor([[[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]]))
    assert nearest_anchor(x, torch.tensor([[1, 2]])).tolist() == [[0, 0, 1, 0]]


def test_the_first_of_anchors_that_differ_by_rounding_is_taken() -> None:
    x = torch.zeros(1, 3, 16)
    x[0, :, 0] = torch.tensor([0.5, 0.5 + 2.0**-24, 1.0])
    assert nearest_anchor(x, torch.tensor([[0, 1]])).tolist() == [[0, 1, 0]]


def test_dot_product_prefers_the_longer_anchor_and_never_overflows() -> None:
    x = torch.tensor([[[1.0, 0.0], [3e38, 3e38], [0.1, 0.0], [-3e38, 3e38]]])
    anchors = torch.tensor([[0, 1]])
    assert nearest_anchor(unit(x), anchors).tolist() == [[0, 1, 0, 1]]
    assert nearest_anchor(unit(x), anchors, length(x)).tolist() == [[0, 1, 1, 0]]
    assert length(x).isfinite().all() and length(torch.zeros(1, 2, 3)).tolist() == [[0.0, 0.0]]


def test_settle_takes_away_less_than_a_millionth() -> None:
    x = torch.rand(1000) * 2 - 1
    assert (quantize(x) - x).abs().max() <= 2.0**-21
    assert torch.equal(quantize(quantize(x)), quantize(x))
    assert quantize(torch.tensor([0.5 + 1e-7])) == quantize(torch.tensor([0.5 - 1e-7]))
