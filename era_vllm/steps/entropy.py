"""Head-wise attention entropy: how evenly a token's attention is spread over the vision heads.

Low entropy = a few heads single the token out = salient. Source: ERA Sec. "DEP" (figures); the
normalisation is reconstructed (docs/method.md, X2 to X4).
"""

import math
from typing import Final, Literal

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from era_vllm.types import Signal, VisualTokens

Saliency = Literal["share", "softmax", "zscore", "logit"]
_NO_MASS: Final = 1e-12
FLAT: Final = 1e-5
"""Entropies that differ by less are equal."""


def head_profile(
    tokens: VisualTokens, saliency: Saliency, temperature: float
) -> Float32[Tensor, "s n hv"]:
    """Return Y: each token's distribution over vision heads; rows sum to 1.

    Args:
        tokens: With encoder attention; for ``logit`` with its scores too.
        saliency: ``share`` = A / sum over heads; ``softmax`` over heads of A; ``zscore`` = softmax
            of A standardised per head; ``logit`` = softmax over heads of the mean score.
        temperature: Divides what goes into a softmax, > 0; unused by ``share``.
    """
    attention = tokens.signal(Signal.ENCODER_ATTENTION).transpose(1, 2)
    if saliency == "share":
        mass = attention.sum(-1, keepdim=True)
        even = torch.full_like(attention, 1.0 / attention.shape[-1])
        return torch.where(mass > _NO_MASS, attention / mass.clamp_min(_NO_MASS), even)
    if saliency == "zscore":
        spread = attention.std(1, keepdim=True, correction=0).clamp_min(_NO_MASS)
        attention = (attention - attention.mean(1, keepdim=True)) / spread
    elif saliency == "logit":
        attention = tokens.signal(Signal.ENCODER_SCORES).transpose(1, 2)
    return (attention / temperature).softmax(-1)


def head_entropy(
    profile: Float32[Tensor, "s n hv"], unattended: Bool[Tensor, "s n"]
) -> Float32[Tensor, "s n"]:
    """Return -sum y ln y / ln H in [0, 1]; 1 with a single head and for unattended tokens."""
    return 1.0 - head_concentration(profile, unattended)


def head_concentration(
    profile: Float32[Tensor, "s n hv"], unattended: Bool[Tensor, "s n"]
) -> Float32[Tensor, "s n"]:
    """Return 1 - ``head_entropy``, to a few bits of its own size however small it is.

    Even attention makes it small, and weights divide by its mean: float32's 1 - e would keep only
    what is above 1e-7. So it is summed as y H ln(y H) - (y H - 1), of which no term is below 0, in
    float64.
    """
    heads = profile.shape[-1]
    if heads == 1:
        return torch.zeros_like(profile[..., 0])
    ratio = profile.double() * heads
    total = (torch.xlogy(ratio, ratio) - (ratio - 1.0)).sum(-1) / (heads * math.log(heads))
    return total.clamp(0.0, 1.0).masked_fill(unattended, 0.0).float()


def unattended(tokens: VisualTokens, mass_guard: float) -> Bool[Tensor, "s n"]:
    """Mark tokens whose attention mass is below ``mass_guard`` times the segment's median."""
    mass = tokens.signal(Signal.ENCODER_ATTENTION).sum(1)
    ranked = mass.sort(-1).values
    middle = (ranked[:, (tokens.n - 1) // 2] + ranked[:, tokens.n // 2]) / 2
    return mass < mass_guard * middle[:, None]


def min_max(x: Float32[Tensor, "s n"]) -> Float32[Tensor, "s n"]:
    """Return x stretched to [0, 1] within each segment; 0 where it is flat."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    spread = high - low
    return torch.where(spread > FLAT, (x - low) / spread.clamp_min(FLAT), 0.0)
