"""The dense oracle against float64 loops and torch, and the two laws that rest on it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from era_vllm.attention.reference import rectified_attention
from era_vllm.pipeline import prune
from era_vllm.policies.dpp import Policy
from era_vllm.types import VisualTokens
from tests import oracle

SEEDS = st.integers(0, 2**32 - 1)


def _random(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@given(seed=SEEDS)
def test_matches_loops_in_float64(seed: int) -> None:
    query, key, value, bias = _random(seed, (5, 4, 8), (9, 2, 8), (9, 2, 6), (9,))
    found = rectified_attention(query, key, value, bias, 0.3, causal=False).numpy()
    for head in range(4):
        q, k, v = (
            x.double().numpy() for x in (query[:, head], key[:, head // 2], value[:, head // 2])
        )
        expected = oracle.attention(q, k, v, bias.double().numpy(), 0.3)
        np.testing.assert_allclose(found[:, head], expected, atol=2e-6)


def test_a_bias_per_kv_head_reaches_its_query_heads() -> None:
    query, key, value, bias = _random(2, (7, 4, 8), (7, 2, 8), (7, 2, 8), (7, 2))
    found = rectified_attention(query, key, value, bias, 0.3)
    for head in range(4):
        one = slice(head // 2, head // 2 + 1)
        alone = (query[:, head : head + 1], key[:, one], value[:, one], bias[:, head // 2])
        expected = rectified_attention(*alone, 0.3)
        torch.testing.assert_close(found[:, head : head + 1], expected, rtol=0, atol=1e-6)


def test_agrees_with_torch_under_a_causal_mask() -> None:
    query, key, value = _random(0, (7, 4, 8), (7, 4, 8), (7, 4, 8))
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)
    found = rectified_attention(query, key, value, torch.zeros(7), 8**-0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", [1, 3, 6])
def test_the_last_queries_of_a_prompt_give_the_last_rows(split: int) -> None:
    query, key, value, bias = _random(1, (7, 4, 8), (7, 2, 8), (7, 2, 8), (7,))
    whole = rectified_attention(query, key, value, bias, 0.3)
    tail = rectified_attention(query[split:], key, value, bias, 0.3)
    torch.testing.assert_close(tail, whole[split:], rtol=0, atol=1e-6)
    head = rectified_attention(query[:split], key[:split], value[:split], bias[:split], 0.3)
    torch.testing.assert_close(head, whole[:split], rtol=0, atol=1e-6)


def test_bias_is_a_natural_log_of_mass() -> None:
    """Equal scores: a key with bias ln 3 gets three times the weight of each other key."""
    value = torch.eye(4)[:, None]
    bias = torch.tensor([0.0, math.log(3.0), 0.0, 0.0])
    out = rectified_attention(torch.zeros(1, 1, 2), torch.ones(4, 1, 2), value, bias, 1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 3.0, 1.0, 1.0]) / 6)


def test_half_precision_is_computed_in_float32() -> None:
    query, key, value, bias = _random(2, (5, 2, 8), (9, 2, 8), (9, 2, 8), (9,))
    q, k, v = (x.bfloat16() for x in (query, key, value))
    wide = rectified_attention(q.float(), k.float(), v.float(), bias, 0.3)
    narrow = rectified_attention(q, k, v, bias, 0.3)
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, wide.bfloat16())


@given(seed=SEEDS, bases=st.integers(2, 12), data=st.data())
def test_merging_equal_keys_and_values_with_log_size_changes_nothing(
    seed: int, bases: int, data: st.DataObject
) -> None:
    """The exactness law, through the real pipeline: tokens are copies, keys follow from tokens."""
    x, to_key, to_value, query = _random(seed, (1, bases, 64), (64, 8), (64, 8), (6, 1, 8))
    extra = data.draw(st.lists(st.integers(0, bases - 1), min_size=1, max_size=30))
    order = data.draw(st.permutations([*range(bases), *extra]))
    copies = x[:, torch.tensor(order)]
    pruned = prune(VisualTokens(copies, (1, len(order))), bases, Policy())
    assert sorted(order[anchor] for anchor in pruned.anchors[0].tolist()) == list(range(bases))

    def attend(tokens: Tensor, bias: Tensor) -> Tensor:
        key, value = (0.1 * (tokens @ matrix)[:, None] for matrix in (to_key, to_value))
        return rectified_attention(query, key, value, bias, 8**-0.5, causal=False)

    full = attend(copies[0], torch.zeros(len(order)))
    reduced = attend(pruned.embeds[0], pruned.log_bias[0])
    torch.testing.assert_close(reduced, full, rtol=0, atol=1e-6)
    silent = attend(pruned.embeds[0], torch.zeros(bases))
    if len({order.count(base) for base in range(bases)}) > 1:
        assert (silent - full).abs().max() > 1e-4, "without the bias it must not hold"


@given(seed=SEEDS, causal=st.booleans())
def test_a_key_column_is_the_same_as_an_added_bias(seed: int, causal: bool) -> None:
    """LAR's kernel form: q~ = [q, 1], k~ = [k, bias / scale], v~ = [v, 0], the scale unchanged."""
    scale = 8**-0.5
    query, key, value, bias = _random(seed, (5, 4, 8), (9, 2, 8), (9, 2, 8), (9,))
    added = rectified_attention(query, key, value, bias.abs(), scale, causal=causal)
    column = (bias.abs() / scale)[:, None, None].expand(-1, 2, 1)
    wide_key = torch.cat([key, column], -1)
    wide_query, wide_value = (
        torch.nn.functional.pad(query, (0, 1), value=1.0),
        torch.cat([value, torch.zeros(9, 2, 1)], -1),
    )
    widened = rectified_attention(
        wide_query, wide_key, wide_value, torch.zeros(9), scale, causal=causal
    )
    torch.testing.assert_close(widened[..., :8], added, rtol=0, atol=2e-6)
    assert not widened[..., 8].any()
