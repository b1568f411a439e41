"""Processes that train one model together: gradients are averaged, work is shared out.

Two ranks of one thread are faster than one of two on a shared machine. Leaves out starting them
(``loop.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(days=7)  # a rank may be stopped for as long as somebody needs the machine


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `count`."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    def join(self, address: str) -> None:
        """Meet the others."""
        if self.count > 1:
            dist.init_process_group(
                "gloo", address, _PATIENCE, world_size=self.count, rank=self.rank
            )

    def added(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor added up over ranks."""
        if self.count == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
