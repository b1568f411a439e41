"""Keep evenly spaced tokens; fold the rest into the most similar anchor. A baseline."""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.steps.bias import log_cluster_size
from era_vllm.steps.merge import nearest
from era_vllm.types import Clusters, Signal, VisualTokens


@dataclass(frozen=True, slots=True)
class Policy:
    """Uniform stride in raster order."""

    @property
    def needs(self) -> frozenset[Signal]:
        """Nothing: positions decide."""
        return frozenset()

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """Return floor(i n / a) for i < a."""
        row = torch.arange(num_anchors, device=tokens.embeds.device) * tokens.n // num_anchors
        return row.repeat(tokens.segments, 1)

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Each token joins its nearest anchor by cosine."""
        return nearest(tokens, anchors)

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return ln of the cluster size."""
        return log_cluster_size(clusters)
