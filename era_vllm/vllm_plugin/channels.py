"""Channels that ride behind an anchor's embedding through vLLM's encoder cache.

Three carry its log-bias (rounded value and two remainders: 8 + 8 + 8 bits for bf16), two the
anchor's index within its image (high and low byte: exact in every dtype, up to 65,535).
"""

from typing import Final, NamedTuple

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

_BIAS: Final = 3
CHANNELS: Final = _BIAS + 2
_BYTE: Final = 256


class Unpacked(NamedTuple):
    """What one image's anchors brought along."""

    embeds: Float[Tensor, "a d"]
    log_bias: Float32[Tensor, "a"]
    anchors: Int[Tensor, "a"]


def pack(
    embeds: Float[Tensor, "s a d"], log_bias: Float32[Tensor, "s a"], anchors: Int[Tensor, "s a"]
) -> Float[Tensor, "s a c"]:
    """Append bias and index to the embeddings: c = d + 5."""
    parts, rest = [], log_bias
    for _ in range(_BIAS):
        part = rest.to(embeds.dtype)
        parts.append(part)
        rest = rest - part.float()
    parts += [(anchors // _BYTE).to(embeds.dtype), (anchors % _BYTE).to(embeds.dtype)]
    return torch.cat([embeds, torch.stack(parts, -1)], -1)


def unpack(packed: Float[Tensor, "a c"]) -> Unpacked:
    """Take embeddings, bias and index apart."""
    embeds, bias, index = packed.split([packed.shape[-1] - CHANNELS, _BIAS, 2], -1)
    high, low = index.long().unbind(-1)
    return Unpacked(embeds, bias.float().sum(-1), high * _BYTE + low)
