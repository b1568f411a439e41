"""Say what each visual token shows: the dense targets with which a tower learns to see.

Of a token (a square of pixels): what kind of thing, its colour, its value (digit, height of the
bar, word), and where in the picture it is, in twelfths. Leaves out the heads (``tower.py``).
"""

from typing import Final

import numpy as np

from era_vllm.lab.synth.assets import DIGIT_SIZE, SHAPES, WORDS
from era_vllm.lab.synth.scene import COLORS, Box, Scene

KINDS: Final = 1 + len(SHAPES) + 4
"""Nothing, the shapes, a digit, a word, a chart, a small sign."""
DIGIT, WORD, CHART, SIGN = range(1 + len(SHAPES), KINDS)
HUES: Final = 1 + len(COLORS)
VALUES: Final = 1 + 10 + 6 + len(WORDS)
PLACES: Final = 12
SIZES: Final = (KINDS, HUES, VALUES, PLACES, PLACES)
"""How many classes each row of the labels has."""
THINGS: Final = len(SHAPES) * len(COLORS) + 10 + len(WORDS) + len(COLORS)
"""Shapes in their colours, digits, words, colours of bars."""


def label(scene: Scene, step: int) -> "np.ndarray":
    """Return the labels of a scene's tokens, [5, rows x columns], int64.

    Args:    step: pixels of a token's side.
    """
    rows, columns = scene.height // step, scene.width // step
    labels = np.zeros((len(SIZES), rows, columns), np.int64)
    labels[3] = ((np.arange(rows) + 0.5) / rows * PLACES).astype(np.int64)[:, None]
    labels[4] = ((np.arange(columns) + 0.5) / columns * PLACES).astype(np.int64)[None]
    if chart := scene.chart:
        _mark(labels, step, chart.box, CHART)
        floor = chart.box.top + chart.box.height - 3
        for index, bar in enumerate(chart.bars):
            left = chart.box.left + 4 + index * 14
            box = Box(left, floor - 7 * bar.value, 11, 7 * bar.value)
            hue = 1 + COLORS.index(bar.color)
            _mark(labels, step, box, CHART, hue, 10 + bar.value, least=0.35)
    if number := scene.number:
        for index, digit in enumerate(number.digits):
            left = number.box.left + 2 + index * (DIGIT_SIZE - 1)
            box = Box(left, number.box.top + 2, DIGIT_SIZE - 1, DIGIT_SIZE)
            _mark(labels, step, box, DIGIT, 0, 1 + digit, least=0.4)
    if word := scene.word:
        _mark(labels, step, word.box, WORD, 0, 17 + WORDS.index(word.text))
    for sign in scene.signs:
        hue = 1 + COLORS.index(sign.color)
        _mark(labels, step, sign.box, SIGN, hue, 17 + WORDS.index(sign.text))
    for shape in scene.shapes:
        _mark(labels, step, shape.box, 1 + SHAPES.index(shape.kind), 1 + COLORS.index(shape.color))
    return labels.reshape(len(SIZES), -1)


def things(scene: Scene) -> "np.ndarray":
    """Return what a picture shows, [THINGS], int64, 0 or 1: the targets of a class token."""
    shown = np.zeros(THINGS, np.int64)
    pairs = len(SHAPES) * len(COLORS)
    for shape in scene.shapes:
        shown[SHAPES.index(shape.kind) * len(COLORS) + COLORS.index(shape.color)] = 1
    for digit in scene.number.digits if scene.number else ():
        shown[pairs + digit] = 1
    if scene.word:
        shown[pairs + 10 + WORDS.index(scene.word.text)] = 1
    for bar in scene.chart.bars if scene.chart else ():
        shown[pairs + 10 + len(WORDS) + COLORS.index(bar.color)] = 1
    return shown


def _mark(
    labels: "np.ndarray",
    step: int,
    box: Box,
    kind: int,
    hue: int = 0,
    value: int = 0,
    least: float = 0.22,
) -> None:
    """Mark tokens that a box covers enough of."""
    high = _shared(labels.shape[1], step, box.top, box.height)
    wide = _shared(labels.shape[2], step, box.left, box.width)
    covered = np.outer(high, wide) >= least * min(step * step, box.width * box.height)
    labels[:3, covered] = np.array([[kind], [hue], [value]])


def _shared(tokens: int, step: int, start: int, length: int) -> "np.ndarray":
    """Return how many pixels each token shares with a box along one axis."""
    first = np.arange(0, tokens * step, step)
    return np.maximum(0, np.minimum(start + length, first + step) - np.maximum(start, first))
