"""HoloV: each crop of the picture gets a budget by its score, spent on its most attended tokens.

Source: Zou et al. 2025, arXiv:2510.02912, and its code. Deviations: docs/policies.md.
"""

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor

from era_vllm.errors import ConfigError
from era_vllm.steps.bias import log_cluster_size
from era_vllm.steps.merge import Rest, with_rest
from era_vllm.steps.ranking import ranked, stretched, top
from era_vllm.steps.similarity import gram, quantize, unit
from era_vllm.types import Clusters, Signal, VisualTokens

_SMALL: Final = 1e-6
"""Added to a crop's mean variance (the paper's code)."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Budgets of crops by highest averages, and within a crop the highest scores."""

    crops: int = 16
    """Runs of tokens in raster order, >= 1."""
    variance: float = 0.09
    """beta, weight of a token's variance of similarities against its attention, [0, 1000]."""
    within: Literal["attention", "score"] = "attention"
    """What a crop's budget is spent by: attention as in the code, or the whole score."""
    rest: Rest = "dropped"
    """Pruned tokens are dropped as published, or merged into the nearest anchor with a log-size
    bias."""

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise ConfigError(f"policy 'holov' crops: got {self.crops}, allowed: >= 1")
        if not 0 <= self.variance <= 1e3:
            raise ConfigError(f"policy 'holov' variance: got {self.variance}, allowed: [0, 1000]")

    @property
    def needs(self) -> frozenset[Signal]:
        """Attention of the class token."""
        return frozenset({Signal.CLASS_ATTENTION})

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """Give anchors to crops one by one, to the largest score over anchors so far plus one.

        So a crop gets its share rounded down at least, what is left goes to large scores, and a
        full crop's share to the others.
        """
        crops = _cut(tokens.n, self.crops, tokens.embeds.device)
        attention = tokens.signal(Signal.CLASS_ATTENTION).mean(1)[:, crops.table]
        attention = attention.masked_fill(~crops.inside, 0.0)
        score = attention + self.variance * self._variance(tokens, crops, attention)
        size = crops.inside.sum(-1)
        worth = score.sum(-1) / size
        most = worth.amax(-1, keepdim=True)
        worth = quantize(worth / torch.where(most > 0, most, 1.0))
        order = attention if self.within == "attention" else score
        order = stretched(order.flatten(1)).view_as(order).masked_fill(~crops.inside, -torch.inf)
        place = ranked(order.flatten(0, 1)).argsort(-1).view_as(order)
        claim = quantize(worth[..., None] / (place + 1))
        return top(claim.flatten(1)[:, crops.place], num_anchors)

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Drop the rest, or merge it."""
        return with_rest(tokens, anchors, self.rest)

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return ln of the cluster size: 0 where nothing was merged."""
        return log_cluster_size(clusters)

    def _variance(
        self, tokens: VisualTokens, crops: "_Crops", attention: Float32[Tensor, "s c m"]
    ) -> Float32[Tensor, "s c m"]:
        """Return the variance of each token's similarities within its crop, as attention is large.

        A token's similarity to itself counts as 0.
        """
        x = unit(tokens.embeds)[:, crops.table]
        both = crops.inside[:, :, None] & crops.inside[:, None]
        itself = torch.eye(both.shape[-1], dtype=torch.bool, device=both.device)
        similarity = gram(x.flatten(0, 1)).view(x.shape[0], *both.shape)
        similarity = similarity.masked_fill(~both | itself, 0.0)
        size = crops.inside.sum(-1)
        least = (size - 1).clamp_min(1)[:, None]
        mean = similarity.sum(-1) / least
        apart = (similarity - mean[..., None]).square().masked_fill(~both, 0.0).sum(-1) / least
        level = (attention.sum(-1) / size) / (apart.sum(-1) / size + _SMALL)
        return apart * level[..., None]


class _Crops(NamedTuple):
    table: Int[Tensor, "c m"]
    """Tokens of each crop; the last one again where a crop is one shorter."""
    inside: Bool[Tensor, "c m"]
    place: Int[Tensor, "n"]
    """Where each token stands in the table."""


def _cut(n: int, crops: int, device: torch.device) -> _Crops:
    """Cut n tokens into runs that differ by one token at most, the longer ones first."""
    count = min(crops, n)
    size, longer = divmod(n, count)
    length = size + (longer > 0)
    crop, column, token = (torch.arange(end, device=device) for end in (count, length, n))
    start = crop * size + crop.clamp_max(longer)
    within_longer = token < longer * (size + 1)
    owner = torch.where(within_longer, token // (size + 1), (token - longer) // size)
    return _Crops(
        (start[:, None] + column).clamp_max(n - 1),
        column < (size + (crop < longer).long())[:, None],
        owner * length + token - start[owner],
    )
