"""Cluster sums and means against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from era_vllm.steps.merge import average, cluster_sizes, cluster_sum, nearest
from era_vllm.types import Clusters, VisualTokens
from tests.strategies import build, generic


@st.composite
def _assignments(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Values [s, n, c], assignments with -1 and with empty clusters, and the number of clusters."""
    segments, n, count = draw(st.integers(1, 4)), draw(st.integers(1, 30)), draw(st.integers(1, 9))
    row = st.lists(st.integers(-1, count - 1), min_size=n, max_size=n)
    assignment = torch.tensor([draw(row) for _ in range(segments)])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(segments, n, draw(st.integers(1, 9)), generator=generator)
    return x, assignment, count


@given(drawn=_assignments())
def test_cluster_sum_matches_a_loop_in_token_order(drawn: tuple[Tensor, Tensor, int]) -> None:
    x, assignment, count = drawn
    expected = torch.zeros(x.shape[0], count, x.shape[2])
    for index in range(x.shape[0]):
        for token, row in enumerate(assignment[index].tolist()):
            if row >= 0:
                expected[index, row] += x[index, token]
    assert torch.equal(cluster_sum(x, assignment, count), expected)


@given(drawn=_assignments(), weighted=st.booleans())
def test_means_and_sizes_match_a_loop(drawn: tuple[Tensor, Tensor, int], weighted: bool) -> None:
    x, assignment, count = drawn
    segments, n, _ = x.shape
    generator = torch.Generator().manual_seed(n)
    weights = torch.rand(segments, n, generator=generator) + 0.1 if weighted else None
    anchors = torch.zeros(segments, count, dtype=torch.int64)
    clusters = Clusters(anchors, assignment, weights)
    means, sizes = average(x, clusters), cluster_sizes(clusters)
    for index in range(segments):
        for row in range(count):
            mine = assignment[index] == row
            assert sizes[index, row] == mine.sum()
            if mine.any():
                share = (torch.ones(n) if weights is None else weights[index])[mine].double()
                mean = (share[:, None] * x[index, mine].double()).sum(0) / share.sum()
                torch.testing.assert_close(means[index, row].double(), mean, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_of_the_largest_values_are_finite(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    for n in range(2, 60):
        embeds = torch.full((1, n, 2), top, dtype=dtype)
        zero = torch.zeros(1, n, dtype=torch.int64)
        mean = average(embeds, Clusters(zero[:, :1], zero))
        torch.testing.assert_close(mean, embeds[:, :1])


@given(drawn=generic())
def test_half_precision_is_averaged_in_float32(drawn: tuple[VisualTokens, int]) -> None:
    tokens = VisualTokens(drawn[0].embeds.bfloat16(), drawn[0].grid)
    merged = average(tokens.embeds, nearest(tokens, torch.tensor([[0]])))
    exact = tokens.embeds.double().mean(1, keepdim=True)
    one_rounding = (merged.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6
    assert one_rounding.all()


def test_matching_by_dot_product_follows_length() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.9, 0.2], [9.0, 9.0]]])
    tokens, anchors = VisualTokens(x, (1, 3)), torch.tensor([[0, 2]])
    assert nearest(tokens, anchors).assignment.tolist() == [[0, 0, 1]]
    assert nearest(tokens, anchors, matching="dot").assignment.tolist() == [[0, 1, 1]]


def test_dropped_tokens_leave_no_trace() -> None:
    tokens = build(0, (2, 3))
    assignment = torch.tensor([[0, -1, 1, -1, 1, 0]])
    clusters = Clusters(torch.tensor([[0, 2]]), assignment)
    spoiled = tokens.embeds.clone()
    spoiled[0, [1, 3]] = 1e30
    assert torch.equal(average(tokens.embeds, clusters), average(spoiled, clusters))
    assert cluster_sizes(clusters).tolist() == [[2, 2]]
