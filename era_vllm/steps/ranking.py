"""Tokens in the order of a score: stretched, so that rounding decides nothing, and ranked.

Ties go to the lowest index.
"""

from typing import Final

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from era_vllm.steps.similarity import quantize

_FLAT: Final = 1e-6  # of the largest value: what float32 leaves of a mean over heads


def stretched(score: Float32[Tensor, "s n"]) -> Float32[Tensor, "s n"]:
    """Return a score stretched to [0, 1] within each segment, rounded to 2**-20; 0 where flat."""
    low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
    spread = high - low
    flat = spread <= _FLAT * torch.maximum(low.abs(), high.abs())
    return quantize(torch.where(flat, 0.0, (score - low) / torch.where(flat, 1.0, spread)))


def ranked(score: Float[Tensor, "s n"]) -> Int[Tensor, "s n"]:
    """Return the tokens' indices, the highest score first."""
    return score.argsort(dim=-1, descending=True, stable=True)


def top(score: Float[Tensor, "s n"], count: int) -> Int[Tensor, "s count"]:
    """Return the ``count`` tokens of highest score, ascending."""
    return ranked(score)[:, :count].sort(-1).values


def others(taken: Int[Tensor, "s t"], n: int) -> Int[Tensor, "s m"]:
    """Return the m = n - t tokens that are not taken, ascending.

    Args:
        taken: Distinct indices.
    """
    mark = torch.zeros(taken.shape[0], n, device=taken.device).scatter(1, taken, -1.0)
    return ranked(mark)[:, : n - taken.shape[1]]
