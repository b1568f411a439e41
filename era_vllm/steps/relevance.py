"""Relevance of visual tokens to a question: from attention, and as a quality of a search.

Source: docs/question.md; the quality r^beta is ours.
"""

import math
from typing import Final, Literal

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from era_vllm.steps.similarity import quantize
from era_vllm.types import Signal, VisualTokens

Reduction = Literal["largest", "mean"]
MOST_WEIGHT: Final = 4.0
"""Of the relevance in a quality; with 1 it is already most of what is chosen by."""
_NUMBERS: Final = 2**25
"""Attention scores at once: 128 MiB in float32, of which softmax needs two."""
_LEAST: Final = 1e-6
"""Of the segment's largest relevance: what a token has at least."""
_LOWEST: Final = -60.0
"""Power of 2 of a quality: its square is still a number of float32."""
_FLAT: Final = 1e-6  # of the largest value: what float32 leaves of a mean over heads
_STRONGEST: Final = 30.0
"""Exponent of a ``theta`` close to 1: e^-30 squared is still a number of float32."""


def question_attention(
    query: Float32[Tensor, "t hq dh"], key: Float32[Tensor, "n hkv dh"], scale: float
) -> Float32[Tensor, "t n"]:
    """Return softmax over the tokens of each word's scores, its mean over heads.

    Args:
        query: Of the question's words.
        key: Of an item's tokens; each head of it serves hq / hkv of the queries.
        scale: Of the scores.
    """
    words, heads, size = query.shape
    of_heads = key.permute(1, 2, 0)[:, None]  # [hkv, 1, dh, n]
    by_kv = query.view(words, key.shape[1], -1, size).permute(1, 2, 0, 3) * scale
    at_once = max(1, _NUMBERS // (heads * key.shape[0]))
    parts = [
        (by_kv[:, :, first : first + at_once] @ of_heads).softmax(-1).mean((0, 1))
        for first in range(0, words, at_once)
    ]
    return torch.cat(parts)


def attention_behind(
    query: Float[Tensor, "b hq t dh"], key: Float[Tensor, "b hkv m dh"], scale: float
) -> Float32[Tensor, "b t m"]:
    """Return causal attention of the last t of m tokens to all of them, its mean over heads.

    Args:
        query: Of those t.
        key: Of all; each head of it serves hq / hkv of the queries.
        scale: Of the scores.
    """
    batch, heads, words, size = query.shape
    kv_heads, total = key.shape[1:3]
    groups = heads // kv_heads
    of_heads = key.float().transpose(2, 3)
    by_kv = query.float().reshape(batch, kv_heads, groups, words, size) * scale
    place = torch.arange(total, device=query.device)
    last = place[total - words :, None]
    at_once = max(1, _NUMBERS // (batch * heads * total))
    parts: list[Tensor] = []
    for first in range(0, words, at_once):
        chosen = slice(first, first + at_once)
        # the heads that share a key are rows of one product, so that it is not copied for each
        product: Tensor = by_kv[..., chosen, :].flatten(2, 3) @ of_heads
        scores = product.view(batch, kv_heads, groups, -1, total)
        scores.masked_fill_(place > last[chosen], -torch.inf)
        parts.append(scores.softmax(-1).mean((1, 2)))
    return torch.cat(parts, 1)


def relevance(attention: Float32[Tensor, "t n"], reduction: Reduction) -> Float32[Tensor, "1 n"]:
    """Return each token's relevance from that to each word."""
    if reduction == "mean":
        return attention.mean(0, keepdim=True)
    return attention.amax(0, keepdim=True)


def has_question(tokens: VisualTokens) -> Bool[Tensor, "s 1"]:
    """Mark segments of which something is asked."""
    return tokens.signal(Signal.RELEVANCE)[:, 0].amax(-1, keepdim=True) > 0


def quality(tokens: VisualTokens, weight: float) -> Float32[Tensor, "s n"]:
    """Return r^weight of each token, r its relevance as a part of the segment's largest.

    Rounded (to about a millionth of itself), so that noise of float32 decides nothing; exactly 1
    where nothing is asked or all are equal.
    """
    given = tokens.signal(Signal.RELEVANCE)[:, 0]
    largest = given.amax(-1, keepdim=True)
    part = torch.where(largest > 0, given / torch.where(largest > 0, largest, 1.0), 1.0)
    return _rounded((weight * part.clamp_min(_LEAST).log2()).clamp_min(_LOWEST))


def contrast(tokens: VisualTokens, theta: float) -> Float32[Tensor, "s n"]:
    """Return CDPruner's quality: relevance stretched to [0, 1] in the segment, and what theta says.

    Args:
        theta: 1 = that and a millionth; below it exp(theta / (2 (1 - theta)) of it), as a part of
            the largest; in [0, 1].

    Returns:
        In (0, about 1]; exactly 1 where nothing is asked or all are equal.

    Source: arXiv:2506.10967 and its code.
    """
    given = tokens.signal(Signal.RELEVANCE)[:, 0]
    low, high = given.amin(-1, keepdim=True), given.amax(-1, keepdim=True)
    spread = high - low
    flat = spread <= _FLAT * high
    part = (given - low) / torch.where(flat, 1.0, spread)
    if theta == 1:
        found = (part + _LEAST).log2()
    else:
        found = min(theta / (2.0 * (1.0 - theta)), _STRONGEST) * (part - 1.0) / math.log(2)
    return torch.where(flat, 1.0, _rounded(found))


def _rounded(log2: Float32[Tensor, "s n"]) -> Float32[Tensor, "s n"]:
    """Return 2 to a power that is rounded: about a millionth of the value, however small."""
    return quantize(log2).exp2()
