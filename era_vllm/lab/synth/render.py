"""Paint a scene: photo, bar chart, number plate, word sign and shapes, as one RGB picture.

Third step of the generator (assets -> scene -> render -> questions). Draws no lots: the same
scene and material give the same pixels. Leaves out the order of objects, which does not matter,
because they never overlap.
"""

from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from era_vllm.lab.synth.assets import DIGIT_SIZE, Material, shape_mask, word_mask
from era_vllm.lab.synth.scene import MAX_VALUE, RGB, Backdrop, Chart, Number, Scene, Shape, Word

_UNIT: Final = 7  # pixels of bar height for a value of one
_BAR: Final = 11  # pixels of bar width


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
    for word in (scene.word, *scene.signs):
        if word is not None:
            _paint_word(picture, word)
    for shape in scene.shapes:
        paint_shape(picture, shape)
    return picture


def _paint_backdrop(backdrop: Backdrop, photo: Image.Image, sides: tuple[int, int]) -> Image.Image:
    left, top = backdrop.left, backdrop.top
    wide, high = (backdrop.size * side // max(sides) for side in sides)
    picture = photo.crop((left, top, left + wide, top + high))
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
        draw.rectangle([left, top, left + _BAR - 1, floor], fill=RGB[bar.color])


def _paint_number(picture: Image.Image, number: Number, material: Material) -> None:
    box = number.box
    picture.paste(number.paper, (box.left, box.top, box.left + box.width, box.top + box.height))
    for place, (digit, hand) in enumerate(zip(number.digits, number.hands, strict=True)):
        corner = (box.left + 2 + place * (DIGIT_SIZE - 1), box.top + 2)
        picture.paste(number.ink, corner, material.digits[digit][hand])


def _paint_word(picture: Image.Image, word: Word) -> None:
    box = word.box
    picture.paste(word.paper, (box.left, box.top, box.left + box.width, box.top + box.height))
    picture.paste(word.ink, (box.left, box.top), word_mask(word.text, word.font_size))


def paint_shape(picture: Image.Image, shape: Shape) -> None:
    """Paint one shape.

    Mutates: picture.
    """
    mask = shape_mask(shape.kind, shape.box.width, shape.turn)
    picture.paste(RGB[shape.color], (shape.box.left, shape.box.top), mask)
