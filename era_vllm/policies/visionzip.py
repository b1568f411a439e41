"""VisionZip: dominant tokens as they are, contextual ones that take up the rest.

Source: Yang et al. 2024, arXiv:2412.04467. Deviations: docs/policies.md.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor

from era_vllm.errors import ConfigError
from era_vllm.steps.bias import log_cluster_size
from era_vllm.steps.merge import cluster_sizes
from era_vllm.steps.ranking import others, ranked, stretched
from era_vllm.steps.similarity import to_anchors, unit
from era_vllm.types import Clusters, Signal, VisualTokens


@dataclass(frozen=True, slots=True)
class Policy:
    """The most attended tokens, and evenly spaced ones with the mean of what is like them."""

    dominant: float = 0.84375
    """Share of the anchors that attention chooses, [0, 1]: 54 of 64, the paper's. One at least,
    and one less than all where there are two or more."""
    weighting: Literal["none", "log_size"] = "none"
    """Bias of a contextual token: none as published, or ln of what it stands for."""

    def __post_init__(self) -> None:
        if not 0 <= self.dominant <= 1:
            raise ConfigError(f"policy 'visionzip' dominant: got {self.dominant}, allowed: [0, 1]")

    @property
    def needs(self) -> frozenset[Signal]:
        """Attention of the class token, and the keys that tokens are matched by."""
        return frozenset({Signal.CLASS_ATTENTION, Signal.ENCODER_KEYS})

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """Return the dominant tokens, and of the others one in each step."""
        count = self._dominant(num_anchors)
        chosen = ranked(_attention(tokens))[:, :count]
        left = others(chosen, tokens.n)
        contextual = num_anchors - count
        step = left.shape[1] // max(1, contextual)
        places = torch.arange(contextual, device=left.device) * step
        return torch.cat([chosen, left[:, places]], 1).sort(-1).values

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Each pruned token joins the contextual one of the most similar key.

        The mean of those that joined counts as much as the contextual token itself.
        """
        dominant = self._of_dominant(tokens, anchors)
        keys = tokens.by_head(Signal.ENCODER_KEYS).mean(1).transpose(1, 2)
        similarity = to_anchors(unit(keys), anchors).masked_fill(dominant[:, None], -torch.inf)
        row = torch.arange(anchors.shape[1], device=anchors.device).expand_as(anchors)
        # with one anchor there is no contextual one
        joined = similarity.argmax(-1) if anchors.shape[1] > 1 else torch.full_like(anchors, -1)
        joined = joined.expand(-1, tokens.n).scatter(1, anchors, row)
        sizes = cluster_sizes(Clusters(anchors, joined))
        share = 1.0 / (sizes - 1).clamp_min(1).gather(1, joined.clamp_min(0)).float()
        return Clusters(anchors, joined, share.scatter(1, anchors, 1.0))

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return 0, or ln of the cluster size."""
        sizes = log_cluster_size(clusters)
        return sizes if self.weighting == "log_size" else torch.zeros_like(sizes)

    def _dominant(self, num_anchors: int) -> int:
        return max(1, min(round(self.dominant * num_anchors), num_anchors - 1))

    def _of_dominant(
        self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]
    ) -> Bool[Tensor, "s a"]:
        """Mark the anchors that attention chose: the most attended of them."""
        order = ranked(_attention(tokens).gather(1, anchors))
        mark = torch.zeros(anchors.shape, dtype=torch.bool, device=anchors.device)
        return mark.scatter(1, order[:, : self._dominant(anchors.shape[1])], True)


def _attention(tokens: VisualTokens) -> Float32[Tensor, "s n"]:
    return stretched(tokens.signal(Signal.CLASS_ATTENTION).mean(1))
