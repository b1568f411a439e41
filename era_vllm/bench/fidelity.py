"""How much blocks and a sample of queries change: merge error, anchors shared."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from era_vllm.bench.photo_tokens import PhotoTokens
from era_vllm.config import EraConfig
from era_vllm.lab.blocks import prune_blocks
from era_vllm.steps.received_attention import MOST_QUERIES, received_attention
from era_vllm.types import PrunedTokens, Signal, VisualTokens


@dataclass(frozen=True, slots=True)
class MergeError:
    """How far tokens are from the row that stands for them, over all tokens."""

    one_minus_cos: float
    relative_mse: float
    """Sum of squared differences, over the sum of squares."""
    kept: int


def merge_error(tokens: VisualTokens, pruned: PrunedTokens) -> MergeError:
    """Compare every token with the merged row of its anchor."""
    index = pruned.assignment[..., None].expand_as(tokens.embeds)
    merged, embeds = pruned.embeds.float().gather(1, index), tokens.embeds.float()
    cosine = cosine_similarity(embeds, merged, -1).mean()
    squares = (embeds - merged).square().sum() / embeds.square().sum()
    return MergeError(1 - float(cosine), float(squares), pruned.anchors.shape[1])


def shared(ours: Int[Tensor, "1 a"], theirs: Int[Tensor, "1 b"]) -> float:
    """Return the share of ``ours`` that is among ``theirs``."""
    return float(torch.isin(ours, theirs).float().mean())


@dataclass(frozen=True, slots=True)
class SampleError:
    """Attention received by a sample of queries, against that of all."""

    mean_relative: float
    """Mean |difference| / mean, over keys, then over heads."""
    bias: float
    """The same with the sign: 0 on average, however large the error."""
    largest_relative: float
    """Largest difference of a key, in its head's mean."""
    anchors_shared: float


def of_all_queries(photo: PhotoTokens) -> Float32[Tensor, "1 hv n"]:
    """Return what each key receives of every query, read in stretches that are not sampled."""
    total = torch.zeros(photo.key.shape[2], photo.key.shape[1])
    n = photo.query.shape[1]
    for part in photo.query.split(MOST_QUERIES, 1):
        share = part.shape[1] / n
        total += received_attention(part, photo.key, photo.scale)[0] * share
    return total[None]


def sample_error(
    photo: PhotoTokens,
    found: Float32[Tensor, "1 hv n"],
    whole: Float32[Tensor, "1 hv n"],
    config: EraConfig,
    rate: float,
) -> SampleError:
    """Compare one reading with that of all queries, and the anchors that follow from both."""
    error = (found - whole) / whole.mean(-1, keepdim=True)
    own, theirs = (
        prune_blocks(_with(photo.tokens, attention), config, rate) for attention in (found, whole)
    )
    return SampleError(
        float(error.abs().mean()),
        float(((found - whole) / whole).mean()),
        float(error.abs().max()),
        shared(own.anchors, theirs.anchors),
    )


def _with(tokens: VisualTokens, attention: Float[Tensor, "1 hv n"]) -> VisualTokens:
    return VisualTokens(tokens.embeds, tokens.grid, {Signal.ENCODER_ATTENTION: attention})
