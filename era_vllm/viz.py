"""Draw what a model still sees: kept tokens, what each of them stands for, and its bias.

Left the picture as the model is given it, right the same picture with its pruned tokens darkened;
of tiles and frames the right one of each:

    bright, framed cell   an anchor, a token that is kept
    dark, tinted cell     a pruned token, merged into an anchor (black: dropped altogether)
    light line            the tokens on its two sides belong to different anchors
    colour                the anchor's bias; exp(bias) = how many tokens it stands for

Leaves out: choosing the tokens (``pipeline``), and where pixels come from (``oracle``). Pillow
alone, so that it works wherever the package does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

_PANEL: Final = 720  # pixels, about: a whole number of cells
_WIDE_PANEL: Final = 960  # where the grid is finer than _COARSE
_COARSE: Final = 16
_MARGIN: Final = 24
_HEAD: Final = 84
_FOOT: Final = 88
_SHEET_PANEL: Final = 320
_CAPTION: Final = 24
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


@dataclass(frozen=True, slots=True)
class Kept:
    """What the pipeline made of one segment, and what the segment shows."""

    image: Image.Image
    """As the model is given it, after resizing and cropping (``seen``)."""
    grid: tuple[int, int]
    """Rows and columns of its visual tokens."""
    anchors: Sequence[int]
    assignment: Sequence[int]
    log_bias: Sequence[float]
    name: str = ""
    """Which tile or frame it is."""


def draw(segments: Sequence[Kept], title: str, note: str = "") -> Image.Image:
    """Draw an item: one segment beside the picture as it was, several as a sheet of all.

    Args:
        segments: Of the item.
        title: First line, to which is added how many tokens are kept.
        note: What else is kept, such as newlines.

    Returns:
        An RGB picture; of one segment 1500 x 900 pixels or more, in which ``cell_box`` says where
        each token lies.
    """
    n = sum(len(one.assignment) for one in segments)
    kept = sum(len(one.anchors) for one in segments)
    title = f"{title}: {n} -> {kept} visual tokens{f', {note}' if note else ''}"
    top = max(math.log(2), *(max(one.log_bias) for one in segments))
    return _pair(segments[0], title, top) if len(segments) == 1 else _sheet(segments, title, top)


def _pair(one: Kept, title: str, top: float) -> Image.Image:
    (rows, columns), cell = one.grid, cell_size(one.grid)
    width = 3 * _MARGIN + 2 * columns * cell
    sheet = Image.new("RGB", (width, _HEAD + rows * cell + _FOOT), _PAPER)
    pen = ImageDraw.Draw(sheet)
    sheet.paste(_given(one, cell), (_MARGIN, _HEAD))
    sheet.paste(_panel(one, cell, top), (2 * _MARGIN + columns * cell, _HEAD))
    pen.text((_MARGIN, 14), title, _INK, _font(24))
    caption = f"the model is given {len(one.assignment)} tokens"
    pen.text((_MARGIN, _HEAD - 30), caption, _FAINT, _font(17))
    caption = f"it keeps {len(one.anchors)}: the bright cells; dark ones are merged into them"
    pen.text((2 * _MARGIN + columns * cell, _HEAD - 30), caption, _FAINT, _font(17))
    _draw_colour_bar(pen, top, width, _HEAD + rows * cell)
    return sheet


def _sheet(segments: Sequence[Kept], title: str, top: float) -> Image.Image:
    """Draw what is kept of several, in rows, all cells of one size."""
    cell = max(4, _SHEET_PANEL // max(max(one.grid) for one in segments))
    panels = [_panel(one, cell, top) for one in segments]
    wide, high = (max(panel.size[axis] for panel in panels) for axis in (0, 1))
    wide, high = max(wide, _SHEET_PANEL // 2), high + _CAPTION
    columns = min(len(panels), max(3, round(math.sqrt(len(panels) * 1.6 * high / wide))))
    rows = -(-len(panels) // columns)
    width = max(_MARGIN + columns * (wide + _MARGIN), 900)
    sheet = Image.new("RGB", (width, _HEAD + rows * (high + _MARGIN) + _FOOT), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, 14), title, _INK, _font(24))
    legend = "bright cells are kept, dark ones are merged into them"
    pen.text((_MARGIN, _HEAD - 34), legend, _FAINT, _font(17))
    for at, (one, panel) in enumerate(zip(segments, panels, strict=True)):
        row, column = divmod(at, columns)
        left, upper = _MARGIN + column * (wide + _MARGIN), _HEAD + row * (high + _MARGIN)
        caption = f"{one.name}: {len(one.assignment)} -> {len(one.anchors)}"
        pen.text((left, upper), caption, _FAINT, _font(15))
        sheet.paste(panel, (left, upper + _CAPTION))
    _draw_colour_bar(pen, top, width, _HEAD + rows * (high + _MARGIN))
    return sheet


def _given(one: Kept, cell: int) -> Image.Image:
    size = one.grid[1] * cell, one.grid[0] * cell
    return one.image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _panel(one: Kept, cell: int, top: float) -> Image.Image:
    """Return the segment with its pruned tokens darkened and its anchors framed."""
    colours = [_colour(bias / top) for bias in one.log_bias]
    given = _given(one, cell)
    panel = _darkened(given, one, colours)
    pen = ImageDraw.Draw(panel)
    _draw_borders(pen, one, cell)
    for anchor, colour in zip(one.anchors, colours, strict=True):
        row, column = divmod(anchor, one.grid[1])
        box = (column * cell, row * cell, column * cell + cell, row * cell + cell)
        panel.paste(given.crop(box), box[:2])
        frame = max(1 if cell < 12 else 2, cell // 10)
        pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=colour, width=frame)
        if cell >= 12:
            inner = (box[0] + frame, box[1] + frame, box[2] - 1 - frame, box[3] - 1 - frame)
            pen.rectangle(inner, outline=(0, 0, 0), width=1)
    return panel


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
        pixels: Normalised pixel values; bytes, which the tower norms itself, are shown as they are.
        mean, std: The processor's ``image_mean`` and ``image_std``.
    """
    values = pixels.cpu()
    if values.dtype != torch.uint8:
        shift, scale = (torch.tensor(one)[:, None, None] for one in (mean, std))
        values = (values.float() * scale + shift).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy(), "RGB")


def _darkened(given: Image.Image, one: Kept, colours: Sequence[Colour]) -> Image.Image:
    grey = ImageOps.grayscale(given).point(lambda value: round(value * _DARKENED))
    anchors = np.reshape(one.assignment, one.grid)

    def enlarged(cells: np.ndarray) -> Image.Image:
        small = Image.fromarray(cells.astype(np.uint8))
        return small.resize(given.size, Image.Resampling.NEAREST)

    mixed = Image.blend(grey.convert("RGB"), enlarged(np.array(colours)[anchors]), _TINT)
    mixed.paste((0, 0, 0), mask=enlarged((anchors < 0) * 255))
    return mixed


def _draw_borders(pen: ImageDraw.ImageDraw, one: Kept, cell: int) -> None:
    (rows, columns), assignment = one.grid, one.assignment
    thickness = 2 if cell > 48 else 1
    for token, anchor in enumerate(assignment):
        row, column = divmod(token, columns)
        left, upper = column * cell, row * cell
        right, lower = left + cell, upper + cell
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
    at = np.linspace(0, 1, len(_COLOURS))
    red, green, blue = (round(np.interp(position, at, one)) for one in zip(*_COLOURS, strict=True))
    return red, green, blue


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
