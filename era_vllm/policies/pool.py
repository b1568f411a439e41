"""Average pooling into exactly a grid cells. A baseline that follows the picture, not its content.

The grid's rows are cut into bands and each band into cells; where a is no product, bands differ
by one cell. The anchor of a cell is its central token.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.errors import PolicyError
from era_vllm.steps.bias import log_cluster_size
from era_vllm.types import Clusters, Signal, VisualTokens


@dataclass(frozen=True, slots=True)
class Policy:
    """Mean of each of a cells that tile the token grid."""

    @property
    def needs(self) -> frozenset[Signal]:
        """Nothing: positions decide."""
        return frozenset()

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """Return the central token of each cell, raster order."""
        height, width = tokens.grid
        if height * width != tokens.n:
            raise PolicyError(f"policy 'pool': grid {height} x {width} does not hold {tokens.n}")
        bands = _bands(height, width, num_anchors)
        cell = torch.arange(num_anchors, device=tokens.embeds.device)
        band = ((cell + 1) * bands - 1) // num_anchors
        start, stop = (
            _first_cell(band, num_anchors, bands),
            _first_cell(band + 1, num_anchors, bands),
        )
        row = _middle(band, bands, height)
        column = _middle(cell - start, stop - start, width)
        return (row * width + column).repeat(tokens.segments, 1)

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Each token belongs to its cell."""
        height, width = tokens.grid
        num_anchors = anchors.shape[1]
        bands = _bands(height, width, num_anchors)
        token = torch.arange(tokens.n, device=tokens.embeds.device)
        band = ((token // width + 1) * bands - 1) // height
        start, stop = (
            _first_cell(band, num_anchors, bands),
            _first_cell(band + 1, num_anchors, bands),
        )
        cell = start + ((token % width + 1) * (stop - start) - 1) // width
        return Clusters(anchors, cell.repeat(tokens.segments, 1))

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return ln of the cell's size."""
        return log_cluster_size(clusters)


def _bands(height: int, width: int, cells: int) -> int:
    """Number of row bands: near-square cells, and no more cells in a band than columns."""
    square = round(math.sqrt(cells * height / width))
    return min(max(square, math.ceil(cells / width), 1), height, cells)


def _first_cell(band: Int[Tensor, "m"], cells: int, bands: int) -> Int[Tensor, "m"]:
    return band * cells // bands


def _middle(part: Int[Tensor, "m"], parts: int | Int[Tensor, "m"], length: int) -> Int[Tensor, "m"]:
    """Middle of a part of a line; part i holds floor(i l / p) .. floor((i+1) l / p)."""
    return (part * length // parts + (part + 1) * length // parts - 1) // 2
