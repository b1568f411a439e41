"""Each segment's hash: the item's own for the first, which is mixed for the others."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from era_vllm.types import Signal
from era_vllm.vllm_plugin.fields import Planned

_GAMMA: Final = 0x9E3779B97F4A7C15
"""splitmix64's (Steele et al. 2014)."""


class PixelHash:
    """Hands on the hash that travelled beside the pixels."""

    gives: Final = frozenset({Signal.PIXEL_HASH})

    def before(self, items: Sequence[Planned]) -> None:
        """Nothing to get ready."""

    def after(
        self, items: Sequence[Planned], rows: Sequence[Tensor]
    ) -> Mapping[Signal, Sequence[Tensor]]:
        """Return int64 [segments] of each item, on the CPU."""
        return {Signal.PIXEL_HASH: [_of_segments(item) for item in items]}


def _of_segments(item: Planned) -> Tensor:
    step = range(len(item.plan.num_anchors))
    return torch.tensor([_signed(item.pixel_hash + index * _GAMMA) for index in step])


def _signed(x: int) -> int:
    x %= 2**64
    return x - 2**64 if x >= 2**63 else x
