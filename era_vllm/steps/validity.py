"""What goes into a policy and what comes out of it, brought into range without a host read.

A value that is wrong concerns one picture of many, so it is repaired and counted
(``types.Degenerate``); a result of the wrong shape or dtype is a fault of the policy's code, which
raises, and shows when an engine profiles its memory.
"""

from dataclasses import replace
from typing import Final

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.errors import PolicyError
from era_vllm.types import NOT_NEGATIVE, Clusters, Degenerate, Signal, VisualTokens

Counts = Int[Tensor, "kinds"]
MOST_LOG_BIAS: Final = 16.0
"""e^16 is 9 million tokens, more than a segment has, and far from where any number format ends."""


def repaired(tokens: VisualTokens, counts: Counts) -> VisualTokens:
    """Return tokens with finite embeddings and signals, and attention >= 0. Mutates: counts."""
    counts[Degenerate.NON_FINITE_EMBEDS] = (~tokens.embeds.isfinite()).sum()
    riders = tokens.riders
    if riders is not None:
        counts[Degenerate.NON_FINITE_EMBEDS] += (~riders.isfinite()).sum()
        riders = riders.nan_to_num(0.0)
    signals: dict[Signal, Tensor] = {}
    for signal, value in tokens.signals.items():
        if not value.is_floating_point():
            signals[signal] = value
            continue
        counts[Degenerate.NON_FINITE_ATTENTION] += (~value.isfinite()).sum()
        value = value.float().nan_to_num(0.0, 0.0, 0.0)
        signals[signal] = value.clamp_min(0.0) if signal in NOT_NEGATIVE else value
    if Signal.ENCODER_ATTENTION in signals:
        dark = signals[Signal.ENCODER_ATTENTION].sum(1) <= 0
        counts[Degenerate.NO_ATTENTION] = dark.sum()
    return replace(tokens, embeds=tokens.embeds.nan_to_num(0.0), signals=signals, riders=riders)


def valid_anchors(
    anchors: Tensor, tokens: VisualTokens, num_anchors: int, counts: Counts
) -> Int[Tensor, "s a"]:
    """Return a policy's anchors; evenly spaced ones for a segment with others than it may choose.

    Raises:
        PolicyError: the wrong shape or dtype.

    Mutates: counts.
    """
    _check("select", anchors, (tokens.segments, num_anchors), torch.int64)
    n = tokens.n
    wrong = (anchors < 0).any(1) | (anchors >= n).any(1) | (anchors.diff(dim=1) <= 0).any(1)
    counts[Degenerate.POLICY_OUTPUT] += wrong.sum()
    even = torch.arange(num_anchors, device=anchors.device) * n // num_anchors
    return torch.where(wrong[:, None], even, anchors)


def valid_clusters(
    clusters: Clusters, anchors: Int[Tensor, "s a"], n: int, counts: Counts
) -> Clusters:
    """Return a policy's clusters; the anchors alone for a segment with an impossible assignment.

    Raises:
        PolicyError: the wrong shape or dtype.

    Mutates: counts.
    """
    given, weights = clusters.assignment, clusters.weights
    segments, num_anchors = anchors.shape
    _check("assign", given, (segments, n), torch.int64)
    row = torch.arange(num_anchors, device=anchors.device).expand(segments, -1)
    wrong = (given < -1).any(1) | (given >= num_anchors).any(1)
    wrong |= (given.gather(1, anchors) != row).any(1)
    if weights is not None:
        _check("assign", weights, tuple(given.shape), torch.float32)
        wrong |= (~(weights >= 0) | ~weights.isfinite()).any(1)
        wrong |= (weights.gather(1, anchors) <= 0).any(1)
        weights = torch.where(wrong[:, None], 1.0, weights)
    counts[Degenerate.POLICY_OUTPUT] += wrong.sum()
    alone = torch.full_like(given, -1).scatter(1, anchors, row)
    return Clusters(anchors, torch.where(wrong[:, None], alone, given), weights)


def valid_bias(
    log_bias: Tensor, anchors: Int[Tensor, "s a"], counts: Counts
) -> Float32[Tensor, "s a"]:
    """Return a policy's log-bias; none for a segment with one below 0, too large, or no number.

    Raises:
        PolicyError: the wrong shape or dtype.

    Mutates: counts.
    """
    _check("log_bias", log_bias, tuple(anchors.shape), torch.float32)
    wrong = (~(log_bias >= 0) | ~(log_bias <= MOST_LOG_BIAS)).any(1)
    counts[Degenerate.POLICY_OUTPUT] += wrong.sum()
    return torch.where(wrong[:, None], 0.0, log_bias)


def _check(step: str, got: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(got.shape) != shape or got.dtype != dtype:
        raise PolicyError(
            f"policy step {step!r}: returned {got.dtype} of shape {tuple(got.shape)}, needed "
            f"{dtype} of shape {shape}"
        )
