"""Tasks as tensors: what every architecture's batch has in common, and how rows are padded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from era_vllm.lab.train.packing import NO_TARGET, Row

HIDDEN = -1e9
"""Added to the score of what is not to be seen."""


@dataclass(frozen=True)
class Batch:
    """b rows of n tokens, v visual tokens; without rows b is 0."""

    pixels: Tensor
    """As the tower takes them."""
    grids: Tensor
    """[items, 3]: moments, rows and columns of patches; none where all pictures are alike."""
    labels: Tensor
    """[5, v]: what a visual token shows."""
    present: Tensor
    """[items, things]: what a picture shows, for a class token; none for a tower without one."""
    ids: Tensor
    """[b, n]"""
    positions: Tensor
    """[3, b, n]"""
    mask: Tensor
    """[b, 1, n, n], added to scores."""
    targets: Tensor
    """[b, n]"""
    rows: tuple[Row, ...]

    def to(self, device: str | torch.device) -> "Batch":
        """Return it on a device."""
        given = {name: value for name, value in vars(self).items() if name != "rows"}
        return replace(self, **{name: value.to(device) for name, value in given.items()})


def padded(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """Return the fields of a batch that are about text."""
    shape = (len(rows), max((len(row.ids) for row in rows), default=0))
    fields = np.empty((6, *shape), np.int64)
    fields.T[:] = pad, NO_TARGET, -1, 0, 0, 0  # ids, targets, owners, three positions
    for index, row in enumerate(rows):
        fields[:, index, : len(row.ids)] = row.ids, row.targets, row.owners, *row.positions
    ids, targets, owner, *positions = torch.from_numpy(fields)
    seen = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
    seen &= torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, HIDDEN)[:, None]
    return {"ids": ids, "positions": torch.stack(positions), "mask": mask, "targets": targets}
