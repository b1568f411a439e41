"""PruMerge+: salient and evenly spaced tokens, each with its nearest neighbours by key.

Source: Shang et al. 2024, arXiv:2403.15388, "plus" form. Deviations: docs/policies.md.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.errors import ConfigError
from era_vllm.steps.bias import log_cluster_size
from era_vllm.steps.ranking import others, ranked, stretched
from era_vllm.steps.similarity import to_anchors, unit
from era_vllm.types import Clusters, Signal, VisualTokens


@dataclass(frozen=True, slots=True)
class Policy:
    """A quarter of the anchors by attention, the others in a stride; neighbours join by weight."""

    salient: float = 0.25
    """Share of the anchors that attention chooses, [0, 1], one at least: the paper adds about
    three evenly spaced tokens to each."""
    neighbours: int = 32
    """Tokens of the most similar keys that may join an anchor, >= 1."""
    weighting: Literal["none", "log_size"] = "none"
    """Bias of an anchor: none as published, or ln of the cluster size."""

    def __post_init__(self) -> None:
        if not 0 <= self.salient <= 1:
            raise ConfigError(f"policy 'prumerge' salient: got {self.salient}, allowed: [0, 1]")
        if self.neighbours < 1:
            raise ConfigError(f"policy 'prumerge' neighbours: got {self.neighbours}, allowed: >= 1")

    @property
    def needs(self) -> frozenset[Signal]:
        """Attention of the class token, and the keys that neighbours are found by."""
        return frozenset({Signal.CLASS_ATTENTION, Signal.ENCODER_KEYS})

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """Return the salient tokens, and evenly spaced ones of the others."""
        count = max(1, round(self.salient * num_anchors))
        attention = stretched(tokens.signal(Signal.CLASS_ATTENTION).mean(1))
        chosen = ranked(attention)[:, :count]
        left = others(chosen, tokens.n)
        spaced = num_anchors - count
        places = torch.arange(spaced, device=left.device) * left.shape[1] // max(1, spaced)
        return torch.cat([chosen, left[:, places]], 1).sort(-1).values

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Each pruned token joins the most similar anchor that has it among its neighbours.

        It counts by its attention there, and the anchor 1; what is nobody's neighbour is dropped.
        """
        keys = tokens.by_head(Signal.ENCODER_KEYS).flatten(1, 2).transpose(1, 2)
        similarity = to_anchors(unit(keys), anchors).transpose(1, 2)
        similarity = similarity.scatter(2, anchors[..., None], -torch.inf)  # none is its own
        near = ranked(similarity.flatten(0, 1))[:, : min(self.neighbours, tokens.n - 1)]
        near = near.view(*anchors.shape, -1)
        known = torch.full_like(similarity, -torch.inf)
        known = known.scatter(2, near, similarity.gather(2, near))
        row = torch.arange(anchors.shape[1], device=anchors.device).expand_as(anchors)
        joined = torch.where(known.amax(1) > -torch.inf, known.argmax(1), -1)
        weights = tokens.signal(Signal.CLASS_ATTENTION).mean(1).scatter(1, anchors, 1.0)
        return Clusters(anchors, joined.scatter(1, anchors, row), weights)

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return 0, or ln of the cluster size."""
        sizes = log_cluster_size(clusters)
        return sizes if self.weighting == "log_size" else torch.zeros_like(sizes)
