"""Paint a scene: photo, bar chart, number plate, word sign and shapes, as one RGB picture.

Third step of the generator (assets -> scene -> render -> questions). Draws no lots: the same
scene and material give the same pixels. Leaves out the order of objects, which does not matter,
because they never overlap.
"""

from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from era_vllm.lab.synth.assets import DIGIT_SIZE, Material, shape_mask, sign_mask, word_mask
from era_vllm.lab.synth.scene import (
    MAX_VALUE,
    Backdrop,
    Chart,
    Color,
    Number,
    Rgb,
    Scene,
    Shape,
    Sign,
    Word,
)

_RGB: Final[dict[Color, Rgb]] = {
    "red": (225, 30, 35),
    "green": (25, 170, 50),
    "blue": (30, 60, 230),
    "yellow": (245, 220, 30),
    "purple": (150, 40, 190),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
_UNIT: Final = 7  # pixels of bar height for a value of one
_BAR: Final = 11  # pixels of bar width
_LIGHT_PLATE, _DARK_PLATE = (240, 240, 240), (25, 25, 40)
_DARK_PAPERS: Final[frozenset[Color]] = frozenset({"red", "green", "blue", "purple", "black"})
_LIGHT_INK, _DARK_INK = (245, 245, 230), (20, 20, 60)


def paint(scene: Scene, material: Material) -> Image.Image:
    """Turn a scene into pixels.

    Args:    material: the one that the scene was drawn with.
    Returns: RGB image of the size of the scene.
    """
    photo = material.photos[scene.backdrop.photo]
    picture = _paint_backdrop(scene.backdrop, photo, (scene.width, scene.height))
    if scene.chart is not None:
        _paint_chart(picture, scene.chart)
    if scene.number is not None:
        _paint_number(picture, scene.number, material)
    if scene.word is not None:
        _paint_word(picture, scene.word)
    for sign in scene.signs:
        _paint_sign(picture, sign)
    for shape in scene.shapes:
        paint_shape(picture, shape)
    return picture


def _paint_backdrop(backdrop: Backdrop, photo: Image.Image, sides: tuple[int, int]) -> Image.Image:
    corner = (backdrop.left, backdrop.top)
    wide, high = (backdrop.size * side // max(sides) for side in sides)
    opposite = (backdrop.left + wide, backdrop.top + high)
    picture = photo.crop((*corner, *opposite))
    picture = picture.resize(sides, Image.Resampling.BILINEAR)
    if backdrop.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(picture, np.float64) * backdrop.gain + np.array(backdrop.tint)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _paint_chart(picture: Image.Image, chart: Chart) -> None:
    draw, box = ImageDraw.Draw(picture), chart.box
    right, floor = box.left + box.width - 1, box.top + box.height - 3
    draw.rectangle([box.left, box.top, right, box.top + box.height - 1], fill=chart.paper)
    red, green, blue = (int(level * 0.8) for level in chart.paper)
    for value in range(1, MAX_VALUE + 1):
        level = floor - value * _UNIT
        draw.line([box.left + 1, level, right - 1, level], fill=(red, green, blue))
    for place, bar in enumerate(chart.bars):
        left = box.left + 4 + place * (_BAR + 3)
        top = floor - bar.value * _UNIT
        draw.rectangle([left, top, left + _BAR - 1, floor], fill=_RGB[bar.color])


def _paint_number(picture: Image.Image, number: Number, material: Material) -> None:
    box = number.box
    plate, ink = (_LIGHT_PLATE, _DARK_INK) if number.dark_on_light else (_DARK_PLATE, _LIGHT_INK)
    picture.paste(plate, (box.left, box.top, box.left + box.width, box.top + box.height))
    for place, (digit, hand) in enumerate(zip(number.digits, number.hands, strict=True)):
        corner = (box.left + 2 + place * (DIGIT_SIZE - 1), box.top + 2)
        picture.paste(ink, corner, material.digits[digit][hand])


def _paint_word(picture: Image.Image, word: Word) -> None:
    box = word.box
    picture.paste(word.paper, (box.left, box.top, box.left + box.width, box.top + box.height))
    picture.paste(word.ink, (box.left, box.top), word_mask(word.text, word.font_size))


def _paint_sign(picture: Image.Image, sign: Sign) -> None:
    box, paper = sign.box, _RGB[sign.color]
    picture.paste(paper, (box.left, box.top, box.left + box.width, box.top + box.height))
    ink = _LIGHT_INK if sign.color in _DARK_PAPERS else _DARK_INK
    picture.paste(ink, (box.left, box.top), sign_mask(sign.text, sign.font_size))


def paint_shape(picture: Image.Image, shape: Shape) -> None:
    """Paint one shape.

    Mutates: picture.
    """
    mask = shape_mask(shape.kind, shape.box.width, shape.turn)
    picture.paste(_RGB[shape.color], (shape.box.left, shape.box.top), mask)
