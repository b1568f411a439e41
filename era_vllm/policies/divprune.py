"""DivPrune: anchors as far from one another as can be, by features alone.

Source: Alvar et al. 2025, arXiv:2503.02175 (max-min diversity); written from the paper. Deviations:
docs/policies.md.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.steps.bias import log_cluster_size
from era_vllm.steps.merge import Rest, with_rest
from era_vllm.steps.search import farthest_first
from era_vllm.steps.similarity import gram, unit
from era_vllm.types import Clusters, Signal, VisualTokens


@dataclass(frozen=True, slots=True)
class Policy:
    """Greedy max-min cosine distance, starting from the token with the farthest neighbour."""

    rest: Rest = "dropped"
    """Pruned tokens are dropped as published, or merged into the nearest anchor with a log-size
    bias."""

    @property
    def needs(self) -> frozenset[Signal]:
        """Nothing but the embeddings."""
        return frozenset()

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """First the token least like its nearest neighbour, then the farthest from all anchors."""
        similarity = gram(unit(tokens.embeds))
        own = torch.eye(tokens.n, dtype=torch.bool, device=similarity.device)
        neighbour = similarity.masked_fill(own, -torch.inf).amax(-1)
        return farthest_first(similarity, neighbour, num_anchors, weight=0.0)

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Drop the rest, or merge it."""
        return with_rest(tokens, anchors, self.rest)

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return ln of the cluster size: 0 where nothing was merged."""
        return log_cluster_size(clusters)
