"""MFPruner: tokens that several rankings agree on.

Source: github.com/dluo112/MFPruner, whose third ranking, relevance to the question, is an option
here: it keeps other tokens for another prompt. Deviations: docs/policies.md.
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.steps.bias import log_cluster_size
from era_vllm.steps.merge import Rest, with_rest
from era_vllm.steps.ranking import ranked, stretched, top
from era_vllm.steps.relevance import has_question
from era_vllm.steps.similarity import gram, unit
from era_vllm.types import Clusters, Signal, VisualTokens

_MAJORITY: Final = 2
"""Rankings that have to name a token."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Two votes of the rankings' first K, filled by the sum of scores."""

    rest: Rest = "dropped"
    """Pruned tokens are dropped as published, or merged into the nearest anchor with a log-size
    bias."""
    relevance: bool = False
    """Have relevance to the question vote too, as published."""

    @property
    def needs(self) -> frozenset[Signal]:
        """Attention of the class token, and on request relevance to the question."""
        extra = {Signal.RELEVANCE} if self.relevance else set[Signal]()
        return frozenset({Signal.CLASS_ATTENTION, *extra})

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """Return the tokens of most votes, then of the largest sum, then of the lowest index."""
        scores = _rankings(tokens)
        votes = torch.zeros_like(scores[0])
        for score in scores:
            votes = votes + _votes(score, num_anchors)
        if self.relevance:
            scores.append(stretched(tokens.signal(Signal.RELEVANCE)[:, 0]))
            votes = votes + _votes(scores[-1], num_anchors) * has_question(tokens)
        elected = torch.where(votes >= _MAJORITY, votes, 0.0)
        by_sum = ranked(torch.stack(scores).sum(0))
        by_votes = ranked(elected.gather(1, by_sum))
        return by_sum.gather(1, by_votes)[:, :num_anchors].sort(-1).values

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Drop the rest, or merge it."""
        return with_rest(tokens, anchors, self.rest)

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return ln of the cluster size: 0 where nothing was merged."""
        return log_cluster_size(clusters)


def _votes(score: Float32[Tensor, "s n"], count: int) -> Float32[Tensor, "s n"]:
    return torch.zeros_like(score).scatter(1, top(score, count), 1.0)


def _rankings(tokens: VisualTokens) -> list[Float32[Tensor, "s n"]]:
    """Return what votes whatever is asked, each in [0, 1]."""
    similarity = gram(unit(tokens.embeds))
    own = torch.eye(tokens.n, dtype=torch.bool, device=similarity.device)
    mean = similarity.masked_fill(own, 0.0).mean(-1)
    return [
        stretched(tokens.signal(Signal.CLASS_ATTENTION).mean(1)),
        stretched(1.0 - mean),
    ]
