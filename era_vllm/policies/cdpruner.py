"""CDPruner: diverse tokens that are relevant to the question.

Source: Zhang et al. 2025, arXiv:2506.10967, and its code (github.com/Theia-4869/CDPruner): greedy
MAP of a determinantal point process whose kernel is conditioned on relevance. Its relevance comes
from CLIP's text tower, ours from the language model that is served. Deviations: docs/policies.md.
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.errors import ConfigError
from era_vllm.steps.bias import log_cluster_size
from era_vllm.steps.merge import Rest, with_rest
from era_vllm.steps.relevance import contrast
from era_vllm.steps.search import dpp_map
from era_vllm.steps.similarity import gram, quantize, unit
from era_vllm.types import Clusters, Signal, VisualTokens

_RIDGE: Final = 1e-3
"""Added to the diagonal of the similarities, so that no choice is made by rounding noise."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Greedy DPP-MAP with relevance to the question as quality, from the most relevant token."""

    theta: float = 1.0
    """How much relevance counts, [0, 1]: 1 = the quality is the relevance itself, as published;
    below it exp(theta / (2 (1 - theta)) relevance), the published option; 0 = not at all."""
    rest: Rest = "dropped"
    """Pruned tokens are dropped as published, or merged into the nearest anchor with a log-size
    bias."""

    def __post_init__(self) -> None:
        if not 0 <= self.theta <= 1:
            raise ConfigError(f"policy 'cdpruner' theta: got {self.theta}, allowed: [0, 1]")

    @property
    def needs(self) -> frozenset[Signal]:
        """Relevance to the question."""
        return frozenset({Signal.RELEVANCE})

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """First the most relevant token, then the largest gain in conditioned volume.

        Where no token is more relevant than another, first the one most similar to all others.
        """
        similarity = gram(unit(tokens.embeds))
        quality = contrast(tokens, self.theta)
        alike = quality.amin(-1) >= quality.amax(-1)
        medoid = quantize(similarity.mean(-1)).argmax(-1)
        first = torch.where(alike, medoid, quality.argmax(-1))
        identity = torch.eye(tokens.n, dtype=similarity.dtype, device=similarity.device)
        return dpp_map(similarity + _RIDGE * identity, first, num_anchors, quality)

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Drop the rest, or merge it."""
        return with_rest(tokens, anchors, self.rest)

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return ln of the cluster size: 0 where nothing was merged."""
        return log_cluster_size(clusters)
