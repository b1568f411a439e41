"""Draw lots for one picture: which photo, shapes, digits, word and bar chart, and where.

Second step of the generator (assets -> scene -> render -> questions). A `Scene` says
everything about a picture: `render.paint` turns it into pixels without drawing lots again, and
`questions.ask_about` reads the right answers off it. Leaves out: pixels, questions.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from era_vllm.lab.synth.assets import (
    DIGIT_SIZE,
    FONT_SIZES,
    SHAPES,
    SIGN_SIZES,
    TURNS,
    WORDS,
    Material,
    ShapeKind,
    word_mask,
)

Color = Literal["red", "green", "blue", "yellow", "purple", "white", "black"]
Rgb = tuple[int, int, int]

COLORS: Final[tuple[Color, ...]] = get_args(Color)
RGB: Final[dict[Color, Rgb]] = {
    "red": (225, 30, 35),
    "green": (25, 170, 50),
    "blue": (30, 60, 230),
    "yellow": (245, 220, 30),
    "purple": (150, 40, 190),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
PICTURE_SIZE: Final = 168
MAX_VALUE: Final = 6  # of a bar

_SHAPE_SIZES: Final = range(15, 27)
_CHART_PAPERS: Final[tuple[Rgb, ...]] = ((235, 235, 235), (205, 215, 225), (240, 230, 205))
_SIGN_COLORS: Final[tuple[Rgb, ...]] = ((200, 30, 30), (20, 90, 40), (20, 40, 130), (30, 30, 30))
_SIGN_WHITE: Final[Rgb] = (250, 250, 250)
_SIGN_CREAM: Final[Rgb] = (245, 240, 225)
_LIGHT_PLATE, _DARK_PLATE = (240, 240, 240), (25, 25, 40)
_DARK_PAPERS: Final[frozenset[Color]] = frozenset({"red", "green", "blue", "purple", "black"})
_LIGHT_INK, _DARK_INK = (245, 245, 230), (20, 20, 60)
_GAP: Final = 2  # pixels at least between two objects
_TRIES: Final = 40  # to find room for one object


@dataclass(frozen=True, slots=True)
class Plan:
    """What lots are drawn for: the sides of a picture, and how likely or how many of each thing.

    The defaults are the shipped LLaVA's pictures. `signs` and `shapes`: fewest and most.
    """

    width: int = PICTURE_SIZE
    height: int = PICTURE_SIZE
    chart: float = 0.6
    number: float = 0.75
    word: float = 0.65
    signs: tuple[int, int] = (0, 0)
    shapes: tuple[int, int] = (2, 7)


STANDARD: Final = Plan()


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of the picture, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def clears(self, other: "Box") -> bool:
        """Whether at least 2 pixels lie between the two boxes."""
        return (
            self.left + self.width + _GAP <= other.left
            or other.left + other.width + _GAP <= self.left
            or self.top + self.height + _GAP <= other.top
            or other.top + other.height + _GAP <= self.top
        )


@dataclass(frozen=True, slots=True)
class Backdrop:
    """A square cut out of a photo (by name), maybe mirrored, dimmed (`gain`), tinted (RGB)."""

    photo: str
    left: int
    top: int
    size: int
    mirrored: bool
    gain: float
    tint: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """One coloured shape; its box is square."""

    kind: ShapeKind
    color: Color
    turn: int
    box: Box

    @property
    def center(self) -> tuple[float, float]:
        """The middle of the shape: x to the right, y downwards."""
        return self.box.left + self.box.width / 2, self.box.top + self.box.height / 2


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a chart; no two have the same colour."""

    color: Color
    value: int


@dataclass(frozen=True, slots=True)
class Chart:
    """A panel with three or four bars."""

    bars: tuple[Bar, ...]
    paper: Rgb
    box: Box


@dataclass(frozen=True, slots=True)
class Number:
    """A plate with one to three handwritten digits; `hands` says which image of each digit."""

    digits: tuple[int, ...]
    hands: tuple[int, ...]
    ink: Rgb
    paper: Rgb
    box: Box


@dataclass(frozen=True, slots=True)
class Word:
    """A sign with one printed word; a small one is named by the colour of its paper."""

    text: str
    font_size: int
    ink: Rgb
    paper: Rgb
    box: Box
    color: Color | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """All that is on one picture; no two objects overlap. Sides in pixels."""

    backdrop: Backdrop
    chart: Chart | None
    number: Number | None
    word: Word | None
    shapes: tuple[Shape, ...]
    signs: tuple[Word, ...] = ()
    width: int = PICTURE_SIZE
    height: int = PICTURE_SIZE


class Room:
    """A picture's room, and what of it is taken."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._taken: list[Box] = []

    def find(self, lots: random.Random, width: int, height: int) -> Box | None:
        """Take room for one object; None: none was found."""
        most_left, most_top = self._plan.width - width - 1, self._plan.height - height - 1
        if min(most_left, most_top) < 1:
            return None
        for _ in range(_TRIES):
            box = Box(lots.randint(1, most_left), lots.randint(1, most_top), width, height)
            if all(box.clears(other) for other in self._taken):
                self._taken.append(box)
                return box
        return None


def draw_scene(
    lots: random.Random,
    material: Material,
    plan: Plan = STANDARD,
    room: Room | None = None,
    kinds: Sequence[ShapeKind] = SHAPES,
    colors: Sequence[Color] = COLORS,
) -> Scene:
    """Draw lots for one picture.

    Large things come first, because what finds no room in 40 tries is left out.

    Args:    room: of a picture with something on it already; None: an empty one.
             kinds, colors: of its shapes.

    Returns: Scene. Its shapes may be none at all, if the rest fills the picture.
    Mutates: lots.
    """
    taken = Room(plan) if room is None else room
    return Scene(
        backdrop=_draw_backdrop(lots, material, plan),
        chart=_draw_chart(lots, taken) if lots.random() < plan.chart else None,
        number=_draw_number(lots, taken, material) if lots.random() < plan.number else None,
        word=_draw_word(lots, taken) if lots.random() < plan.word else None,
        signs=_draw_signs(lots, taken, plan.signs) if plan.signs[1] else (),
        shapes=_draw_shapes(lots, taken, plan.shapes, kinds, colors),
        width=plan.width,
        height=plan.height,
    )


def _draw_backdrop(lots: random.Random, material: Material, plan: Plan) -> Backdrop:
    photo = lots.choice(tuple(material.photos))
    width, height = material.photos[photo].size
    longest = max(plan.width, plan.height)
    size = min(int(longest * lots.uniform(0.6, 2.2)), width, height)
    left, top = lots.randint(0, width - size), lots.randint(0, height - size)
    mirrored = lots.random() < 0.5
    gain = lots.uniform(0.35, 0.8)
    red, green, blue = (lots.uniform(20, 110) for _ in range(3))
    strength = lots.uniform(0.3, 0.9)
    tint = (red * strength, green * strength, blue * strength)
    return Backdrop(photo, left, top, size, mirrored, gain, tint)


def _draw_chart(lots: random.Random, taken: Room) -> Chart | None:
    count = lots.randint(3, 4)
    box = taken.find(lots, width=14 * count + 6, height=46)
    if box is None:
        return None
    paper = lots.choice(_CHART_PAPERS)
    colors: list[Color] = lots.sample([color for color in COLORS if color != "white"], count)
    bars = tuple(Bar(color, lots.randint(1, MAX_VALUE)) for color in colors)
    return Chart(bars, paper, box)


def _draw_number(lots: random.Random, taken: Room, material: Material) -> Number | None:
    count = lots.randint(1, 3)
    box = taken.find(lots, width=(DIGIT_SIZE - 1) * count + 5, height=DIGIT_SIZE + 4)
    if box is None:
        return None
    digits = tuple(lots.randint(0, 9) for _ in range(count))
    hands = tuple(lots.randrange(len(material.digits[digit])) for digit in digits)
    dark = lots.random() < 0.5
    ink, paper = (_DARK_INK, _LIGHT_PLATE) if dark else (_LIGHT_INK, _DARK_PLATE)
    return Number(digits, hands, ink, paper, box)


def _draw_word(lots: random.Random, taken: Room) -> Word | None:
    text, font_size = lots.choice(WORDS), lots.choice(FONT_SIZES)
    box = taken.find(lots, *word_mask(text, font_size).size)
    if box is None:
        return None
    color = lots.choice(_SIGN_COLORS)
    ink, paper = (_SIGN_WHITE, color) if lots.random() < 0.5 else (color, _SIGN_CREAM)
    return Word(text, font_size, ink, paper, box)


def _draw_signs(lots: random.Random, taken: Room, counts: tuple[int, int]) -> tuple[Word, ...]:
    count = lots.randint(*counts)
    signs: list[Word] = []
    for text, color in zip(lots.sample(WORDS, count), lots.sample(COLORS, count), strict=True):
        font_size = lots.choice(SIGN_SIZES)
        box = taken.find(lots, *word_mask(text, font_size).size)
        if box is not None:
            ink = _LIGHT_INK if color in _DARK_PAPERS else _DARK_INK
            signs.append(Word(text, font_size, ink, RGB[color], box, color))
    return tuple(signs)


def _draw_shapes(
    lots: random.Random,
    taken: Room,
    counts: tuple[int, int],
    kinds: Sequence[ShapeKind],
    colors: Sequence[Color],
) -> tuple[Shape, ...]:
    most = min(5, len(kinds))
    few = lots.sample(kinds, lots.randint(2, most))  # few kinds, so that counts go past one
    shapes: list[Shape] = []
    for _ in range(lots.randint(*counts)):
        kind, color, size = lots.choice(few), lots.choice(colors), lots.choice(_SHAPE_SIZES)
        box = taken.find(lots, size, size)
        if box is not None:
            shapes.append(Shape(kind, color, lots.randrange(TURNS), box))
    return tuple(shapes)
