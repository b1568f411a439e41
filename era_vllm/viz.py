"""Draw what a model still sees: kept tokens, what each of them stands for, and its bias.

Left the picture as the model is given it, right the same picture with its pruned tokens darkened:

    bright, framed cell   an anchor, a token that is kept
    dark, tinted cell     a pruned token, merged into an anchor (black: dropped altogether)
    light line            the tokens on its two sides belong to different anchors
    colour                the anchor's bias; exp(bias) = how many tokens it stands for

Leaves out: choosing the tokens (``pipeline``), and where pixels come from (``oracle``). Pillow
alone, so that it works wherever the package does.
"""

import math
from itertools import pairwise
from typing import Final

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from era_vllm.types import PrunedTokens

_PANEL: Final = 720  # pixels, about: a whole number of cells
_WIDE_PANEL: Final = 960  # where the grid is finer than _COARSE
_COARSE: Final = 16
_MARGIN: Final = 24
_HEAD: Final = 84
_FOOT: Final = 88
_PAPER: Final = (250, 250, 248)
_INK: Final = (32, 32, 36)
_FAINT: Final = (104, 104, 112)
_LINE: Final = (225, 225, 225)
_DARKENED: Final = 0.36  # of a pruned token's grey, before its tint
_TINT: Final = 0.30
# Dark to light at even steps, and told apart without red or green: blue, violet, orange, yellow.
_COLOURS: Final = ((48, 76, 201), (145, 48, 178), (214, 63, 122), (246, 132, 68), (250, 226, 64))
_TICKS: Final = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)

Colour = tuple[int, int, int]


def draw(
    image: Image.Image,
    pruned: PrunedTokens,
    grid: tuple[int, int],
    title: str,
) -> Image.Image:
    """Draw the first segment.

    Args:
        image: The segment as the model is given it, after resizing and cropping (``seen``).
        pruned: What the pipeline made of it.
        grid: Rows and columns of its visual tokens.
        title: First line, to which is added how many tokens are kept.

    Returns:
        An RGB picture of 1500 x 900 pixels or more; ``cell_box`` says where each token lies in it.
    """
    rows, columns = grid
    cell = cell_size(grid)
    anchors = pruned.anchors[0].tolist()
    assignment = pruned.assignment[0].tolist()
    biases = pruned.log_bias[0].tolist()
    top = max(max(biases), math.log(2))
    colours = [_colour(bias / top) for bias in biases]
    given = image.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)

    width = 3 * _MARGIN + 2 * columns * cell
    sheet = Image.new("RGB", (width, _HEAD + rows * cell + _FOOT), _PAPER)
    pen = ImageDraw.Draw(sheet)
    sheet.paste(given, (_MARGIN, _HEAD))
    sheet.paste(_darkened(given, assignment, colours, grid), (2 * _MARGIN + columns * cell, _HEAD))
    _draw_borders(pen, assignment, grid)
    for anchor, colour in zip(anchors, colours, strict=True):
        left, upper, right, lower = cell_box(anchor, grid)
        own = cell_box(anchor, grid, panel=0)
        sheet.paste(sheet.crop(own), (left, upper))
        frame = max(2, cell // 10)
        pen.rectangle((left, upper, right - 1, lower - 1), outline=colour, width=frame)
        inner = (left + frame, upper + frame, right - 1 - frame, lower - 1 - frame)
        pen.rectangle(inner, outline=(0, 0, 0), width=1)

    kept = f"{title}: {len(assignment)} -> {len(anchors)} visual tokens"
    pen.text((_MARGIN, 14), kept, _INK, _font(24))
    pen.text(
        (_MARGIN, _HEAD - 30), f"the model is given {len(assignment)} tokens", _FAINT, _font(17)
    )
    caption = f"it keeps {len(anchors)}: the bright cells; dark ones are merged into them"
    pen.text((2 * _MARGIN + columns * cell, _HEAD - 30), caption, _FAINT, _font(17))
    _draw_colour_bar(pen, top, width, _HEAD + rows * cell)
    return sheet


def cell_size(grid: tuple[int, int]) -> int:
    """Return the side of one token's cell in the drawing, in pixels."""
    side = max(grid)
    return max(8, (_PANEL if side <= _COARSE else _WIDE_PANEL) // side)


def cell_box(token: int, grid: tuple[int, int], panel: int = 1) -> tuple[int, int, int, int]:
    """Return where a token lies in the drawing.

    Args:
        panel: 0 = the picture as given, 1 = what is kept.

    Returns:
        Left, upper, right and lower pixel, the last two outside, as Pillow has it.
    """
    cell, columns = cell_size(grid), grid[1]
    row, column = divmod(token, columns)
    left = _MARGIN + panel * (_MARGIN + columns * cell) + column * cell
    return left, _HEAD + row * cell, left + cell, _HEAD + (row + 1) * cell


def seen(
    pixels: Float[Tensor, "c h w"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Image.Image:
    """Undo a processor's normalisation: the picture that the encoder is given.

    Args:
        pixels: Normalised pixel values.
        mean: The processor's ``image_mean``.
        std: The processor's ``image_std``.
    """
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    values = (pixels.float().cpu() * scale + shift).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy(), "RGB")


def _darkened(
    given: Image.Image, assignment: list[int], colours: list[Colour], grid: tuple[int, int]
) -> Image.Image:
    cell = cell_size(grid)
    grey = ImageOps.grayscale(given).point(lambda value: round(value * _DARKENED))
    tints = Image.new("RGB", (grid[1], grid[0]))
    for token, anchor in enumerate(assignment):
        row, column = divmod(token, grid[1])
        tints.putpixel((column, row), colours[anchor] if anchor >= 0 else (0, 0, 0))
    flat = tints.resize(given.size, Image.Resampling.NEAREST)
    dropped = Image.new("L", (grid[1], grid[0]))
    dropped.putdata([0 if anchor >= 0 else 255 for anchor in assignment])
    mixed = Image.blend(grey.convert("RGB"), flat, _TINT)
    mixed.paste((0, 0, 0), mask=dropped.resize(given.size, Image.Resampling.NEAREST))
    assert mixed.size == (grid[1] * cell, grid[0] * cell)
    return mixed


def _draw_borders(pen: ImageDraw.ImageDraw, assignment: list[int], grid: tuple[int, int]) -> None:
    rows, columns = grid
    thickness = 2 if cell_size(grid) > 48 else 1
    for token, anchor in enumerate(assignment):
        left, upper, right, lower = cell_box(token, grid)
        row, column = divmod(token, columns)
        if column + 1 < columns and assignment[token + 1] != anchor:
            pen.line((right, upper, right, lower), _LINE, thickness)
        if row + 1 < rows and assignment[token + columns] != anchor:
            pen.line((left, lower, right, lower), _LINE, thickness)


def _draw_colour_bar(pen: ImageDraw.ImageDraw, top: float, width: int, upper: int) -> None:
    label = "an anchor stands for, in tokens = exp(bias)"
    font = _font(17)
    start = _MARGIN + round(font.getlength(label)) + 20
    length = width - _MARGIN - start - 24
    y = upper + 22
    pen.text((_MARGIN, y - 1), label, _INK, font)
    for x in range(length):
        pen.line((start + x, y, start + x, y + 20), _colour(x / max(length - 1, 1)))
    for tick in _TICKS:
        if math.log(tick) > top + 1e-6:
            break
        x = start + round(math.log(tick) / top * (length - 1))
        pen.line((x, y + 20, x, y + 27), _INK, 2)
        pen.text((x, y + 30), f"{tick:g}", _INK, font, anchor="ma")


def _colour(position: float) -> Colour:
    steps = list(pairwise(_COLOURS))
    scaled = min(max(position, 0.0), 1.0) * len(steps)
    index = min(int(scaled), len(steps) - 1)
    low, high = steps[index]
    part = scaled - index
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
