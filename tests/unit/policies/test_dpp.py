"""dpp against brute-force greedy log-determinant, its medoid start, and exact attention."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from era_vllm.errors import ConfigError
from era_vllm.pipeline import prune
from era_vllm.policies.dpp import Policy
from era_vllm.types import VisualTokens
from tests import oracle
from tests.strategies import generic


@given(drawn=generic(), ridge=st.sampled_from([0.05, 0.1, 1.0]))
def test_matches_brute_force(drawn: tuple[VisualTokens, int], ridge: float) -> None:
    tokens, count = drawn
    count = min(count, 12)
    x = tokens.embeds[0].double().numpy()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    closeness = (unit @ unit.T).mean(axis=1)
    assume(np.diff(np.sort(closeness))[-1] > 1e-5)
    kernel = unit @ unit.T + ridge * np.eye(tokens.n)
    expected = oracle.greedy_log_det(kernel, int(closeness.argmax()), count)
    assume(expected.margin > 1e-4)
    assert (
        prune(tokens, count, Policy(ridge=ridge)).anchors[0].tolist() == expected.anchors.tolist()
    )


def test_starts_at_the_medoid() -> None:
    """Of tokens at known angles, the one nearest the direction of their sum."""
    angle = torch.tensor([[math.pi / 2, 0.2, 0.0, -0.2, 0.1]])
    tokens = VisualTokens(torch.stack([angle.cos(), angle.sin()], -1), (1, 5))
    assert prune(tokens, 1, Policy()).anchors.tolist() == [[1]]
    right = VisualTokens(tokens.embeds[:, 1:], (1, 4))
    assert prune(right, 1, Policy()).anchors.tolist() == [[1]]


@given(drawn=generic(), factor=st.sampled_from([2.0**-30, 0.5, 2.0**30]))
def test_scale_of_features_does_not_matter(drawn: tuple[VisualTokens, int], factor: float) -> None:
    tokens, count = drawn
    here = prune(tokens, count, Policy())
    there = prune(VisualTokens(tokens.embeds * factor, tokens.grid), count, Policy())
    assert torch.equal(here.anchors, there.anchors)
    assert torch.equal(here.log_bias, there.log_bias)


def test_bias_is_the_log_of_the_cluster_size() -> None:
    x = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0))
    pruned = prune(VisualTokens(x, (5, 6)), 7, Policy())
    sizes = torch.stack([row.bincount() for row in pruned.assignment])
    torch.testing.assert_close(pruned.log_bias.exp(), sizes.float())


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
def test_ridge_is_positive(ridge: float) -> None:
    with pytest.raises(ConfigError, match="ridge"):
        Policy(ridge=ridge)
