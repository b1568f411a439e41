"""Bias channels: an anchor's log-bias rides behind its embedding through vLLM's encoder cache.

Three channels of the model's dtype (rounded value and two remainders) carry float32 exactly
enough: 8 + 8 + 8 bits for bf16.
"""

from typing import Final

import torch
from jaxtyping import Float, Float32
from torch import Tensor

CHANNELS: Final = 3


def pack(
    embeds: Float[Tensor, "s a d"], log_bias: Float32[Tensor, "s a"]
) -> Float[Tensor, "s a c"]:
    """Append the bias to the embeddings: c = d + 3."""
    parts, rest = [], log_bias
    for _ in range(CHANNELS):
        part = rest.to(embeds.dtype)
        parts.append(part)
        rest = rest - part.float()
    return torch.cat([embeds, torch.stack(parts, -1)], -1)


def unpack(
    packed: Float[Tensor, "a c"],
) -> tuple[Float[Tensor, "a d"], Float32[Tensor, "a"]]:
    """Return embeddings and bias."""
    return packed[..., :-CHANNELS], packed[..., -CHANNELS:].float().sum(-1)
