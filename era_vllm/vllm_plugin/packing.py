"""Columns that ride behind an anchor's embedding through vLLM's encoder cache.

    [embedding | riders | bias x 3 | offset x 2 an axis]

Three carry its log-bias (rounded value and two remainders: 8 + 8 + 8 bits for bf16), two an axis
its position relative to its run's first (high and low byte: exact in every dtype, up to 65,535).
"""

from typing import Final, NamedTuple

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

_BIAS: Final = 3
_BYTE: Final = 256
MOST_OFFSETS: Final = _BYTE**2
"""Positions that two bytes tell apart in every dtype."""


class Unpacked(NamedTuple):
    """What one item's anchors brought along."""

    rows: Float[Tensor, "a d"]
    """Embedding and riders, as vLLM's own encoder gives them."""
    log_bias: Float32[Tensor, "a"]
    offsets: Int[Tensor, "a p"]


def pack(
    rows: Float[Tensor, "*s d"], log_bias: Float32[Tensor, "*s"], offsets: Int[Tensor, "*s p"]
) -> Float[Tensor, "*s c"]:
    """Append bias and offsets to the rows: c = d + 3 + 2 p."""
    parts, rest = [], log_bias
    for _ in range(_BIAS):
        part = rest.to(rows.dtype)
        parts.append(part)
        rest = rest - part.float()
    bytes_of = torch.stack([offsets // _BYTE, offsets % _BYTE], -1).flatten(-2).to(rows.dtype)
    return torch.cat([rows, torch.stack(parts, -1), bytes_of], -1)


def unpack(packed: Float[Tensor, "a c"], axes: int) -> Unpacked:
    """Take rows, bias and the offsets on p axes apart."""
    width = packed.shape[-1] - _BIAS - 2 * axes
    rows, bias, offsets = packed.split([width, _BIAS, 2 * axes], -1)
    high, low = offsets.long().unflatten(-1, (axes, 2)).unbind(-1)
    return Unpacked(rows, bias.float().sum(-1), high * _BYTE + low)
