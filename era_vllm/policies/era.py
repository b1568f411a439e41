"""ERA: Dual-view Entropy Pruning, Bias-aware Token Recycling, Logit-preserving Attention
Rectification.

Source: Wang et al. 2026, arXiv:2606.31982. The paper has no code; every point that had to be
reconstructed is an option here, with the recommended default and its number in docs/method.md.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.errors import ConfigError
from era_vllm.steps.bias import is_pruned, log_cluster_size, log_weighted_size
from era_vllm.steps.entropy import Saliency, head_concentration, head_profile, min_max, unattended
from era_vllm.steps.merge import Matching, nearest
from era_vllm.steps.relevance import MOST_WEIGHT, quality
from era_vllm.steps.search import dpp_map, farthest_first
from era_vllm.steps.similarity import gram, unit
from era_vllm.types import Clusters, Signal, VisualTokens

_EVEN: Final = 1e-3
"""Mean saliency below which weights turn even, continuously, with the same mean: attention is known
to 1e-6 of itself, and dividing by less would make more than about 1e-5 of that in ln b
(tests/unit/policies/test_flat_attention.py)."""
_LARGE: Final = 1e3  # beyond it nothing changes any more but float32 overflows


@dataclass(frozen=True, slots=True)
class Policy:
    """The paper's method. Anchors are diverse in features and head profile, and low in entropy."""

    saliency: Saliency = "share"
    """X2: how attention becomes a distribution over heads."""
    temperature: float = 1.0
    """X2: of the softmax forms of ``saliency``, [0.001, 1000]."""
    mass_guard: float = 1e-3
    """X4: tokens below this fraction of the median attention mass get entropy 1."""
    profile_weight: float = 0.1
    """X5: lambda, share of the head profile in the dual view, [0, 1]. Source: docs/accuracy.md."""
    search: Literal["additive", "multiplicative", "dpp"] = "additive"
    """X6: how entropy enters the greedy search."""
    entropy_penalty: float = 0.3
    """X6: alpha, weight of the entropy in the additive search, [0, 1000]."""
    matching: Matching = "cosine"
    """X7: similarity by which a pruned token finds its anchor."""
    centroid: Literal["mean", "weighted"] = "mean"
    """X8: plain mean of the cluster, or weighted as in the bias (an anchor counts 1)."""
    weighting: Literal["saliency", "literal", "log_size", "none"] = "log_size"
    """X9: weight of a pruned token in b: rho s / mean(s), ``literal_scale`` s, 1, or 0. Source:
    docs/accuracy.md."""
    mass_scale: float = 0.39
    """X9: rho, mean weight of a pruned token, [0, 1000]; 0.39 reproduces the paper's figure."""
    literal_scale: float = 5.3
    """X9: factor of the ``literal`` weighting, [0, 1000]."""
    relevance_weight: float = 0.0
    """beta, [0, 4]: relevance to the question to that power multiplies a token's distance to the
    anchors, and its quality where ``search`` is dpp; 0 = nobody asks. Source: ours
    (docs/question.md)."""

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (1e-3, _LARGE),
            "mass_guard": (0.0, _LARGE),
            "profile_weight": (0.0, 1.0),
            "entropy_penalty": (0.0, _LARGE),
            "mass_scale": (0.0, _LARGE),
            "literal_scale": (0.0, _LARGE),
            "relevance_weight": (0.0, MOST_WEIGHT),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"policy 'era' {name}: got {getattr(self, name)}, allowed: [{low:g}, {high:g}]"
                )

    @property
    def needs(self) -> frozenset[Signal]:
        """Encoder attention; its scores too where the saliency is taken from them, and relevance to
        the question where that has a weight.
        """
        extra = {Signal.ENCODER_SCORES} if self.saliency == "logit" else set[Signal]()
        extra |= {Signal.RELEVANCE} if self.relevance_weight else set[Signal]()
        return frozenset({Signal.ENCODER_ATTENTION, *extra})

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """DEP: greedy search in the dual view, penalised by head entropy."""
        profile, concentration = self._view(tokens)
        views = (
            (1 - self.profile_weight) ** 0.5 * unit(tokens.embeds),
            self.profile_weight**0.5 * unit(profile),
        )
        similarity = gram(torch.cat(views, -1))
        penalty = min_max(-concentration)  # of the entropy, whose last bits 1 - it has lost
        weighs = quality(tokens, self.relevance_weight) if self.relevance_weight else None
        if self.search == "dpp":
            salient = (1.0 - penalty).clamp_min(1e-3)
            kernel = salient[:, :, None] * similarity * salient[:, None]
            ridge = 0.1 * torch.eye(tokens.n, dtype=kernel.dtype, device=kernel.device)
            return dpp_map(kernel + ridge, penalty.argmin(-1), num_anchors, weighs)
        return farthest_first(
            similarity,
            penalty,
            num_anchors,
            weight=self.entropy_penalty,
            multiplicative=self.search == "multiplicative",
            quality=weighs,
        )

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """BTR: each pruned token joins its most similar anchor; clusters become their mean."""
        clusters = nearest(tokens, anchors, matching=self.matching)
        if self.centroid == "mean":
            return clusters
        return replace(clusters, weights=self._weights(tokens, clusters).scatter(1, anchors, 1.0))

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """LAR: ln b, b = 1 + the weights of the tokens merged into the anchor."""
        if self.weighting == "log_size":
            return log_cluster_size(clusters)
        return log_weighted_size(clusters, self._weights(tokens, clusters))

    def _weights(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s n"]:
        saliency = self._view(tokens)[1]
        if self.weighting == "none":
            return torch.zeros_like(saliency)
        if self.weighting == "log_size":
            return torch.ones_like(saliency)
        if self.weighting == "literal":
            return self.literal_scale * saliency
        pruned = is_pruned(clusters.anchors, clusters.assignment)
        count = pruned.sum(-1, keepdim=True).clamp_min(1)
        mean = torch.where(pruned, saliency, 0.0).sum(-1, keepdim=True) / count
        even = (1.0 - mean / _EVEN).clamp_min(0.0)
        return self.mass_scale * (saliency / mean.clamp_min(_EVEN) + even)

    def _view(
        self, tokens: VisualTokens
    ) -> tuple[Float32[Tensor, "s n hv"], Float32[Tensor, "s n"]]:
        profile = head_profile(tokens, self.saliency, self.temperature)
        return profile, head_concentration(profile, unattended(tokens, self.mass_guard))
