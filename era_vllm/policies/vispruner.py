"""VisPruner: half of the anchors by attention, half by taking duplicates out of the others.

Source: Zhang et al. 2025, arXiv:2412.01818. Deviations: docs/policies.md.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.errors import ConfigError
from era_vllm.steps.bias import log_cluster_size
from era_vllm.steps.merge import Rest, with_rest
from era_vllm.steps.ranking import ranked, stretched
from era_vllm.steps.similarity import gram, unit
from era_vllm.types import Clusters, Signal, VisualTokens

_AT_ONCE: Final = 8
"""Duplicates that a round takes out (the paper's)."""
_ROUNDS: Final = 64
"""Of more than 8 x 64 duplicates a round takes out more, so that rounds do not grow with n."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The most attended tokens, and those of the others that resemble no other."""

    important: float = 0.5
    """Share of the anchors that attention chooses, [0, 1], rounded up."""
    rest: Rest = "dropped"
    """Pruned tokens are dropped as published, or merged into the nearest anchor with a log-size
    bias."""

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise ConfigError(
                f"policy 'vispruner' important: got {self.important}, allowed: [0, 1]"
            )

    @property
    def needs(self) -> frozenset[Signal]:
        """Attention of the class token."""
        return frozenset({Signal.CLASS_ATTENTION})

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """Return the attended tokens and the distinct ones."""
        count = math.ceil(num_anchors * self.important)
        order = ranked(stretched(tokens.signal(Signal.CLASS_ATTENTION).mean(1)))
        chosen, others = order[:, :count], order[:, count:]
        if count < num_anchors:
            distinct = _distinct(gram(unit(tokens.embeds)), others, num_anchors - count)
            chosen = torch.cat([chosen, distinct], 1)
        return chosen.sort(-1).values

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Drop the rest, or merge it."""
        return with_rest(tokens, anchors, self.rest)

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return ln of the cluster size: 0 where nothing was merged."""
        return log_cluster_size(clusters)


def _distinct(
    similarity: Float32[Tensor, "s n n"], tokens: Int[Tensor, "s m"], count: int
) -> Int[Tensor, "s count"]:
    """Return tokens without those that are most like another.

    In each round every second token is held against the others; those with the closest match go,
    and what stays of the half comes first in the next round, the closest match first.

    Args:
        tokens: In the order in which the first round halves them.
        count: >= 1.
    """
    n = similarity.shape[1]
    at_once = max(_AT_ONCE, -(-(tokens.shape[1] - count) // _ROUNDS))
    while (surplus := tokens.shape[1] - count) > 0:
        held, against = tokens[:, ::2], tokens[:, 1::2]
        rows = similarity.gather(1, held[..., None].expand(-1, -1, n))
        match = rows.gather(2, against[:, None].expand(-1, held.shape[1], -1)).amax(-1)
        stay = ranked(match)[:, min(at_once, surplus) :]
        tokens = torch.cat([held.gather(1, stay), against], 1)
    return tokens
