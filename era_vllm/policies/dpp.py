"""Diverse anchors by a determinantal point process, log-size bias: no attention maps needed.

Source: kernel and greedy MAP as in CDPruner (arXiv:2506.10967) without its text term; the medoid
start and the log-size bias are ours. Beats the reconstructed paper on the shipped model.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.errors import ConfigError
from era_vllm.steps.bias import log_cluster_size
from era_vllm.steps.merge import nearest
from era_vllm.steps.relevance import MOST_WEIGHT, quality
from era_vllm.steps.search import dpp_map
from era_vllm.steps.similarity import gram, quantize, unit
from era_vllm.types import Clusters, Signal, VisualTokens


@dataclass(frozen=True, slots=True)
class Policy:
    """Greedy DPP-MAP on unit projector outputs, starting from the medoid."""

    ridge: float = 0.1
    """Added to the kernel's diagonal, > 0: keeps it positive definite among near-duplicates."""
    relevance_weight: float = 0.0
    """beta, [0, 4]: a token's quality in the kernel is its relevance to the question to that power;
    0 = nobody asks. Small ones, about .1: docs/question.md."""

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ConfigError(f"policy 'dpp' ridge: got {self.ridge}, allowed: > 0")
        if not 0 <= self.relevance_weight <= MOST_WEIGHT:
            raise ConfigError(
                f"policy 'dpp' relevance_weight: got {self.relevance_weight}, allowed: [0, "
                f"{MOST_WEIGHT:g}]"
            )

    @property
    def needs(self) -> frozenset[Signal]:
        """Nothing but the embeddings; relevance to the question where that has a weight."""
        return frozenset({Signal.RELEVANCE} if self.relevance_weight else ())

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """First the token most similar to all others, then the largest gain in volume."""
        similarity = gram(unit(tokens.embeds))
        medoid = quantize(similarity.mean(-1)).argmax(-1)
        identity = torch.eye(tokens.n, dtype=similarity.dtype, device=similarity.device)
        weighs = quality(tokens, self.relevance_weight) if self.relevance_weight else None
        return dpp_map(similarity + self.ridge * identity, medoid, num_anchors, weighs)

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Each token joins its nearest anchor by cosine."""
        return nearest(tokens, anchors)

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return ln of the cluster size."""
        return log_cluster_size(clusters)
