"""Masks of what is drawn on a picture: seven shapes and twenty-four words.

Used by `scenes.py` (how much room a word takes) and `painting.py` (its pixels). Leaves out the
handwritten digits, which are photographs of a kind and come from `material.py`.
"""

import math
from functools import cache
from typing import Final, Literal, get_args

from PIL import Image, ImageDraw, ImageFont

ShapeKind = Literal["circle", "square", "triangle", "star", "cross", "diamond", "ring"]

SHAPES: Final[tuple[ShapeKind, ...]] = get_args(ShapeKind)
FONT_SIZES: Final = range(15, 19)

# Room that a word takes at each font size, as Pillow 13 measures it. Written down, because other
# releases differ by a pixel, and every later lot of a picture depends on it.
_WORD_SIZES: Final[dict[str, tuple[tuple[int, int], ...]]] = {
    "cat": ((29, 18), (32, 19), (32, 19), (35, 20)),
    "dog": ((35, 22), (38, 23), (41, 23), (41, 25)),
    "sun": ((31, 16), (34, 17), (36, 17), (37, 18)),
    "bus": ((32, 19), (35, 20), (36, 20), (38, 21)),
    "cup": ((33, 19), (36, 20), (37, 20), (39, 22)),
    "hat": ((29, 19), (32, 20), (33, 20), (35, 21)),
    "key": ((32, 22), (34, 23), (36, 23), (37, 25)),
    "map": ((38, 19), (41, 20), (42, 20), (44, 22)),
    "pen": ((33, 19), (36, 20), (38, 20), (39, 22)),
    "box": ((34, 19), (36, 20), (37, 20), (39, 21)),
    "fish": ((31, 19), (35, 21), (36, 21), (38, 22)),
    "bird": ((34, 19), (37, 20), (38, 20), (40, 22)),
    "tree": ((34, 18), (37, 19), (39, 19), (41, 20)),
    "moon": ((47, 16), (51, 17), (55, 17), (55, 18)),
    "milk": ((35, 19), (39, 20), (40, 20), (41, 22)),
    "stop": ((38, 21), (42, 22), (43, 22), (46, 24)),
    "exit": ((31, 19), (35, 20), (36, 20), (38, 22)),
    "open": ((42, 19), (46, 20), (49, 20), (50, 22)),
    "sale": ((34, 19), (38, 20), (39, 20), (41, 21)),
    "taxi": ((31, 19), (35, 20), (35, 20), (38, 22)),
    "cafe": ((36, 19), (41, 21), (42, 21), (45, 22)),
    "bank": ((41, 19), (45, 20), (46, 20), (49, 21)),
    "shop": ((41, 22), (45, 23), (47, 23), (49, 25)),
    "park": ((38, 22), (41, 23), (41, 23), (45, 25)),
}
WORDS: Final = tuple(_WORD_SIZES)
TURNS: Final = 4  # how many slightly different tilts a shape comes in

_OVERSAMPLING: Final = 4
_TILT: Final = 0.12  # radians between two turns
_RING_WIDTH: Final = 0.27  # of the diameter
_WORD_MARGIN: Final = 4

Point = tuple[float, float]


@cache
def shape_mask(kind: ShapeKind, size: int, turn: int) -> Image.Image:
    """Draw one shape as an antialiased mask.

    Args:    size: side in pixels.   turn: 0..3, the tilt; only square, triangle and star show it.
    Returns: an "L" image, size x size, 255 inside. Shared: do not draw on it.
    """
    side = size * _OVERSAMPLING
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if kind in ("circle", "ring"):
        draw.ellipse([1, 1, side - 2, side - 2], fill=255)
    if kind == "ring":
        hole = side * _RING_WIDTH
        draw.ellipse([hole, hole, side - hole, side - hole], fill=0)
    if kind not in ("circle", "ring"):
        center, radius = side / 2, side / 2 - 1
        outline = _outline(kind, (turn - (TURNS - 1) / 2) * _TILT)
        draw.polygon([(center + radius * x, center + radius * y) for x, y in outline], fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


def _outline(kind: ShapeKind, tilt: float) -> list[Point]:
    """Corners of a shape in the unit circle, y downwards."""

    def around(corners: int, start: float, radii: tuple[float, ...] = (1.0,)) -> list[Point]:
        points: list[Point] = []
        for corner in range(corners):
            angle = start + tilt + corner * 2 * math.pi / corners
            radius = radii[corner % len(radii)]
            points.append((radius * math.cos(angle), radius * math.sin(angle)))
        return points

    if kind == "square":
        return around(4, math.pi / 4)
    if kind == "triangle":
        return around(3, -math.pi / 2)
    if kind == "star":
        return around(10, -math.pi / 2, (1.0, 0.42))
    if kind == "diamond":
        return [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)]
    arm = 0.32  # half the width of an arm of the cross
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    corners: list[Point] = []
    for _ in range(4):  # clockwise, a quarter turn each
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


@cache
def word_mask(text: str, font_size: int) -> Image.Image:
    """Draw one word in Pillow's own font, with a margin of 4 pixels.

    Args:    text: one of WORDS.   font_size: one of FONT_SIZES.
    Returns: an "L" image, 255 inside. Shared: do not draw on it.
    """
    font = ImageFont.load_default(font_size)
    left, _, _, bottom = (int(edge) for edge in font.getbbox(text))
    width, height = _WORD_SIZES[text][FONT_SIZES.index(font_size)]
    mask = Image.new("L", (width, height), 0)
    corner = (_WORD_MARGIN - left, height - _WORD_MARGIN - bottom)
    ImageDraw.Draw(mask).text(corner, text, font=font, fill=255)
    return mask
