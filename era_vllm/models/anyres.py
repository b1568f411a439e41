"""Pictures as a base view and a grid of tiles (LLaVA-NeXT, LLaVA-OneVision). No vllm import.

Of the grid's tokens [rows x side, columns x side] those of padding are cut off, OneVision resizes
the rest to a bounded number, and a newline follows each row of what remains:

    0 .. side^2 - 1                       the base view
    side^2 + r (width + 1) + c            row r, column c of the rest; c = width is the newline

The base view is a segment, and so is what remains of each tile: tiles are not square any more, and
one that is all padding is none.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from era_vllm.layout import Layout, SegmentLayout

Separators = Literal["rows", "tile_rows", "none"]
"""``EraConfig.separators``."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a model cuts its pictures into tiles."""

    pinpoints: tuple[tuple[int, int], ...]
    """(height, width) in pixels of the grids that there are."""
    tile: int
    """Pixels of a tile's side."""
    side: int
    """Rows and columns of a tile's tokens."""
    max_tiles: int | None = None
    """A grid of clearly more tokens than those of so many tiles is resized to them; None = none."""


@dataclass(frozen=True, slots=True)
class TileGrid:
    """One picture's tokens behind its base view."""

    side: int
    tiles: tuple[int, int]
    """Rows and columns of tiles."""
    cut: tuple[int, int]
    """Rows and columns of padding that are cut off, at each side."""
    unpadded: tuple[int, int]
    """Rows and columns of what remains, either of which may be 0."""
    resized: tuple[int, int]
    """The same after a resize."""

    def shown(self, axis: int, band: int, ends: tuple[int, int]) -> tuple[float, float]:
        """Return first and last of what rows (columns) show of their tile, as a share of it."""
        step = self.unpadded[axis] / self.resized[axis]
        first, last = ((self.cut[axis] + end * step) / self.side - band for end in ends)
        return max(first, 0.0), min(last, 1.0)

    def bands(self, axis: int) -> list[tuple[int, int]]:
        """Return first and last + 1 of the rows (columns) that each row (column) of tiles has.

        Where there was a resize a row belongs to the tile that its centre falls into, of two the
        later.
        """
        rows = self.resized[axis]
        ones, tiles = torch.arange(rows), torch.arange(1, self.tiles[axis] + 1)
        centres = (2 * ones + 1) * self.unpadded[axis] + 2 * rows * self.cut[axis]
        last = torch.searchsorted(centres, 2 * rows * self.side * tiles).tolist()
        return list(zip([0, *last], last, strict=False))


@lru_cache(maxsize=256)
def tile_grid(tiling: Tiling, height: int, width: int) -> TileGrid:
    """Return the grid of a picture of so many pixels.

    Upstream: vllm/model_executor/models/llava_next.py:147 and llava_onevision.py:131
    ``_get_num_unpadded_features`` (0.32.0), whose roundings are these.
    """
    shape = get_anyres_image_grid_shape(
        (height, width), [*map(list, tiling.pinpoints)], tiling.tile
    )
    rows, columns = (count * tiling.side for count in shape)
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    unpadded = rows - 2 * top, columns - 2 * left
    resized = unpadded
    if tiling.max_tiles is not None:
        ratio = math.sqrt(unpadded[0] * unpadded[1] / (tiling.max_tiles * tiling.side**2))
        if ratio > 1.1:
            resized = int(unpadded[0] // ratio), int(unpadded[1] // ratio)
    return TileGrid(tiling.side, shape, (top, left), unpadded, resized)


@lru_cache(maxsize=8)
def most_tokens(tiling: Tiling) -> tuple[int, int]:
    """Return the height and width of the picture with the most tokens.

    It fills a pinpoint but for some rows or columns of padding: with a bound on the tokens that is
    the one just below it, where nothing is resized.
    """
    patch = tiling.tile / tiling.side
    sizes = [
        size
        for height, width in tiling.pinpoints
        for size in (
            *((math.ceil(patch * rows), width) for rows in range(1, round(height / patch) + 1)),
            *((height, math.ceil(patch * columns)) for columns in range(1, round(width / patch))),
        )
    ]

    def tokens(size: tuple[int, int]) -> int:
        rows, columns = tile_grid(tiling, *size).resized
        return rows * (columns + 1)

    return max(sizes, key=tokens)


@lru_cache(maxsize=256)
def tiled(tiling: Tiling, height: int, width: int, separators: Separators) -> Layout:
    """Return the layout of a picture of so many pixels, which are its shape."""
    grid = tile_grid(tiling, height, width)
    rows, columns = grid.resized
    base = tiling.side**2
    places = base + torch.arange(rows * (columns + 1)).view(rows, columns + 1)
    segments = [SegmentLayout((tiling.side, tiling.side), torch.arange(base))]
    ends_of_tiles = []
    for row, (top, bottom) in enumerate(grid.bands(0)):
        ends_of_tiles += [bottom - 1] if bottom > top else []
        for column, (left, right) in enumerate(grid.bands(1)):
            part = places[top:bottom, left:right]
            if part.numel():
                upper, lower = grid.shown(0, row, (top, bottom))
                first, last = grid.shown(1, column, (left, right))
                unit, box = 1 + row * grid.tiles[1] + column, (upper, first, lower, last)
                size = bottom - top, right - left
                segments.append(SegmentLayout(size, part.flatten(), unit, box))
    newlines = places[:, columns]
    kept = {"rows": newlines, "tile_rows": newlines[ends_of_tiles], "none": newlines[:0]}
    units = 1 + math.prod(grid.tiles)
    return Layout(
        (height, width),
        base + places.numel(),
        tuple(segments),
        kept[separators].clone(),
        units=units,
        work=units * base,
    )


def arranged(maps: Float32[Tensor, "u c m"], grid: TileGrid) -> Float32[Tensor, "c length"]:
    """Do to a picture's maps what the family does to its features; newlines get 0."""
    (rows, columns), side, count = grid.tiles, grid.side, maps.shape[1]
    tiles = maps[1:].unflatten(2, (side, side)).unflatten(0, (rows, columns))
    whole = tiles.permute(2, 0, 3, 1, 4).reshape(count, rows * side, columns * side)
    (top, left), (height, width) = grid.cut, grid.unpadded
    whole = whole[:, top : top + height, left : left + width]
    if grid.resized != grid.unpadded:
        whole = nn.functional.interpolate(whole[None], list(grid.resized), mode="bilinear")[0]
    whole = nn.functional.pad(whole, (0, 1))
    return torch.cat([maps[0], whole.flatten(1)], 1)
