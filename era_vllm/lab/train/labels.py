"""Say what each visual token shows: the dense targets with which a tower learns to see.

Of a token (16 x 16 pixels): what kind of thing, its colour, its value (digit, height of the bar,
word), and where in the picture it is, in twelfths. Leaves out the heads (``tower.py``).
"""

from typing import Final

import numpy as np

from era_vllm.lab.synth.assets import DIGIT_SIZE, SHAPES, WORDS
from era_vllm.lab.synth.scene import COLORS, Box, Scene
from era_vllm.lab.synth.tasks import SIDE_STEP

KINDS: Final = 1 + len(SHAPES) + 4
"""Nothing, the shapes, a digit, a word, a chart, a small sign."""
_DIGIT, _WORD, _CHART, _SIGN = range(1 + len(SHAPES), KINDS)
HUES: Final = 1 + len(COLORS)
VALUES: Final = 1 + 10 + 6 + len(WORDS)
PLACES: Final = 12
SIZES: Final = (KINDS, HUES, VALUES, PLACES, PLACES)
"""How many classes each row of the labels has."""
IGNORED: Final = -100


def label(scene: Scene) -> "np.ndarray":
    """Return the labels of a scene's tokens, [5, rows x columns], int64."""
    rows, columns = scene.height // SIDE_STEP, scene.width // SIDE_STEP
    labels = np.zeros((len(SIZES), rows, columns), np.int64)
    labels[3] = ((np.arange(rows) + 0.5) / rows * PLACES).astype(np.int64)[:, None]
    labels[4] = ((np.arange(columns) + 0.5) / columns * PLACES).astype(np.int64)[None]
    if chart := scene.chart:
        _mark(labels, chart.box, _CHART)
        floor = chart.box.top + chart.box.height - 3
        for index, bar in enumerate(chart.bars):
            left = chart.box.left + 4 + index * 14
            box = Box(left, floor - 7 * bar.value, 11, 7 * bar.value)
            hue = 1 + COLORS.index(bar.color)
            _mark(labels, box, _CHART, hue, 10 + bar.value, least=0.35)
    if number := scene.number:
        for index, digit in enumerate(number.digits):
            left = number.box.left + 2 + index * (DIGIT_SIZE - 1)
            box = Box(left, number.box.top + 2, DIGIT_SIZE - 1, DIGIT_SIZE)
            _mark(labels, box, _DIGIT, 0, 1 + digit, least=0.4)
    if word := scene.word:
        _mark(labels, word.box, _WORD, 0, 17 + WORDS.index(word.text))
    for sign in scene.signs:
        hue = 1 + COLORS.index(sign.color)
        _mark(labels, sign.box, _SIGN, hue, 17 + WORDS.index(sign.text))
    for shape in scene.shapes:
        _mark(labels, shape.box, 1 + SHAPES.index(shape.kind), 1 + COLORS.index(shape.color))
    return labels.reshape(len(SIZES), -1)


def _mark(
    labels: "np.ndarray", box: Box, kind: int, hue: int = 0, value: int = 0, least: float = 0.3
) -> None:
    """Mark tokens that a box covers enough of."""
    enough = least * min(SIDE_STEP * SIDE_STEP, box.width * box.height)
    for row in range(box.top // SIDE_STEP, min(labels.shape[1], _end(box.top + box.height))):
        high = _shared(row, box.top, box.height)
        for column in range(
            box.left // SIDE_STEP, min(labels.shape[2], _end(box.left + box.width))
        ):
            if high * _shared(column, box.left, box.width) >= enough:
                labels[:3, row, column] = kind, hue, value


def _end(edge: int) -> int:
    return -(-edge // SIDE_STEP)


def _shared(index: int, start: int, length: int) -> int:
    """Pixels that a token shares with a box along one axis."""
    first, last = index * SIDE_STEP, (index + 1) * SIDE_STEP
    return max(0, min(start + length, last) - max(start, first))
