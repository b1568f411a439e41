"""Heads that attend nearly alike: the last bits of attention decide nothing."""

import pytest
import torch
from torch import Tensor

from era_vllm.policies.era import Policy
from era_vllm.steps.merge import cluster_sizes
from era_vllm.types import Clusters, Signal, VisualTokens

SEGMENTS, TOKENS, ANCHORS = 3, 144, 32
FLOOR = 1e-3
SPREADS = (1e-4, 1e-3, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1.0)
"""Of the heads' attention scores: mean(1 - e) from 1e-9 to .15."""


def tower(heads: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return embeddings and attention [s, h, n], float64, of a random tower."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(SEGMENTS, heads, TOKENS, generator=generator, dtype=torch.float64)
    embeds = torch.randn(SEGMENTS, TOKENS, 16, generator=generator)
    return embeds, (scores * spread).softmax(-1)


def clusters_of(embeds: Tensor) -> Clusters:
    """Return clusters that do not depend on the attention."""
    anchors = torch.arange(0, TOKENS, TOKENS // ANCHORS)[:ANCHORS].expand(SEGMENTS, -1)
    return Policy().assign(VisualTokens(embeds, (12, 12)), anchors)


def log_bias(embeds: Tensor, attention: Tensor, clusters: Clusters) -> Tensor:
    tokens = VisualTokens(embeds, (12, 12), {Signal.ENCODER_ATTENTION: attention.float()})
    return Policy(weighting="saliency").log_bias(tokens, clusters)


def exact(attention: Tensor, clusters: Clusters, floor: float) -> tuple[Tensor, Tensor]:
    """Return ln b in float64 and mean(1 - e), written out anew."""
    share = attention / attention.sum(1, keepdim=True)
    heads = torch.tensor(float(attention.shape[1]), dtype=torch.float64)
    saliency = 1.0 + torch.xlogy(share, share).sum(1) / heads.log()
    saliency = saliency.clamp_min(0.0)
    result = torch.empty(clusters.anchors.shape, dtype=torch.float64)
    means = torch.empty(len(saliency), dtype=torch.float64)
    for row, (own, anchors) in enumerate(zip(saliency, clusters.anchors, strict=True)):
        pruned = torch.ones(TOKENS, dtype=torch.bool)
        pruned[anchors] = False
        means[row] = own[pruned].mean()
        weight = 0.39 * (1 + (own - means[row]) / means[row].clamp_min(floor))
        mass = torch.ones(ANCHORS, dtype=torch.float64)
        mass.scatter_add_(0, clusters.assignment[row][pruned], weight[pruned])
        result[row] = mass.log()
    return result, means


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("heads", [4, 12, 16, 32])
def test_noise_of_attention_stays_noise_of_the_bias(heads: int, spread: float) -> None:
    """A millionth of each share: what another kernel, or a GPU, gives."""
    generator = torch.Generator().manual_seed(1)
    for seed in range(3):
        embeds, attention = tower(heads, spread, seed)
        clusters = clusters_of(embeds)
        noise = 1e-6 * torch.randn(attention.shape, generator=generator, dtype=torch.float64)
        plain = log_bias(embeds, attention, clusters)
        noisy = log_bias(embeds, attention * (1 + noise), clusters)
        assert (noisy - plain).abs().max() < 2e-5
        expected, _ = exact(attention, clusters, FLOOR)
        assert (plain - expected).abs().max() < 5e-6


@pytest.mark.parametrize("heads", [4, 16])
def test_above_the_floor_weights_are_the_paper_s_and_below_they_turn_even(heads: int) -> None:
    seen = []
    for spread in SPREADS:
        embeds, attention = tower(heads, spread, 7)
        clusters = clusters_of(embeds)
        found = log_bias(embeds, attention, clusters).double()
        even = torch.log(1 + 0.39 * (cluster_sizes(clusters) - 1).double())
        ideal, mean = exact(attention, clusters, 1e-15)
        if mean.min() >= FLOOR:
            torch.testing.assert_close(found, ideal, rtol=0, atol=2e-6)
        if mean.max() < FLOOR / 1e3:
            torch.testing.assert_close(found, even, rtol=0, atol=2e-3)
        pruned = TOKENS - ANCHORS
        total = (found.exp() - 1).sum(-1)
        assert torch.allclose(total, torch.full_like(total, 0.39 * pruned), rtol=1e-5)
        seen.append(mean.mean().item())
    assert seen[0] < FLOOR / 1e3 and seen[-1] > 10 * FLOOR


def test_there_is_no_jump_on_the_way() -> None:
    """Through the floor, and through 1e-5 where one was: small steps make small steps."""
    embeds, _ = tower(16, 1.0, 3)
    clusters = clusters_of(embeds)
    steps = torch.logspace(-4, 0, 2000).tolist()
    rows = torch.stack([log_bias(embeds, tower(16, one, 3)[1], clusters) for one in steps])
    assert (rows[1:] - rows[:-1]).abs().max() < 0.02
