"""Ask about a scene: nine families of questions, each with its one right answer.

Last step of the generator (assets -> scene -> render -> questions). Wordings are the ones
the shipped checkpoint learned; its tokenizer folds capitals, plurals and punctuation into them.
Leaves out the picture: right answers are read off the scene.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, Literal, get_args

from era_vllm.errors import ConfigError, unknown_name
from era_vllm.lab.synth.assets import SHAPES
from era_vllm.lab.synth.scene import COLORS, Scene, Shape

Family = Literal[
    "exist", "color", "shape", "count", "spatial", "where", "number", "word", "chart"
]  # fmt: skip

TaskFamily = Family | Literal["relation", "reading", "which", "indexed", "motion", "moment"]
"""The nine, and those of `tasks.py`."""

FAMILIES: Final[tuple[Family, ...]] = get_args(Family)
LEARNED_FAMILIES: Final[tuple[Family, ...]] = (
    "exist", "color", "shape", "count", "number", "word", "chart"
)  # fmt: skip
"""Those that the shipped checkpoint answers; it guesses at `spatial` and is weak at `where`."""

_MIN_OFFSET: Final = 14  # pixels between two centres before one is "left of" the other: one patch
_BORDER: Final = 0.08  # thirds from a third's edge where `where` is not asked


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its right answer, in lower case."""

    family: TaskFamily
    text: str
    answer: str


def check_families(families: Collection[Family]) -> None:
    """Refuse unknown families and an empty choice.

    Raises: ConfigError.
    """
    if isinstance(families, str) or not families:
        raise ConfigError(
            f"families must be a collection of names, got {families!r}; "
            f"choose among: {', '.join(FAMILIES)}"
        )
    for family in families:
        if family not in FAMILIES:
            raise ConfigError(unknown_name("question family", family, FAMILIES))


def ask_about(
    scene: Scene, lots: random.Random, families: Collection[Family], count: int
) -> tuple[Question, ...]:
    """Draw questions that the scene answers.

    Args:    families: the kinds of question to draw from.   count: at most so many.
    Returns: different questions, maybe fewer than count, none if the scene suits no family.
    Mutates: lots.
    """
    suited: list[Family] = [name for name in FAMILIES if name in families]
    choices = [name for name in suited for _ in range(_FAMILIES[name][0](scene))]
    questions: dict[str, Question] = {}
    for _ in range(2 * count if choices else 0):
        family = lots.choice(choices)
        drawn = _FAMILIES[family][1](scene, lots)
        if drawn is not None:
            questions.setdefault(drawn[0], Question(family, *drawn))
        if len(questions) == count:
            break
    return tuple(questions.values())


def alone(scene: Scene, *parts: Literal["kind", "color"]) -> list[Shape]:
    """Return the shapes that can be named by these parts without ambiguity."""
    named = attrgetter(*parts)
    counts = Counter(map(named, scene.shapes))
    return [shape for shape in scene.shapes if counts[named(shape)] == 1]


_Drawn = tuple[str, str] | None  # text and answer; None: these lots make no clear question


def _exist(scene: Scene, lots: random.Random) -> _Drawn:
    present = {(shape.kind, shape.color) for shape in scene.shapes}
    if present and lots.random() < 0.5:
        shape = lots.choice(scene.shapes)
        return f"is there a {shape.color} {shape.kind}?", "yes"
    while True:  # an absent pair: at most 7 of 49 are present
        kind, color = lots.choice(SHAPES), lots.choice(COLORS)
        if present and lots.random() < 0.7:  # mostly a near miss: half of it is in the picture
            near = lots.choice(scene.shapes)
            kind, color = (near.kind, color) if lots.random() < 0.5 else (kind, near.color)
        if (kind, color) not in present:
            return f"is there a {color} {kind}?", "no"


def _count(scene: Scene, lots: random.Random) -> _Drawn:
    about = lots.random()
    if about >= 0.85:
        return "how many shapes?", str(len(scene.shapes))
    seen = bool(scene.shapes) and lots.random() < 0.8
    if about < 0.45:
        kind = lots.choice(scene.shapes).kind if seen else lots.choice(SHAPES)
        total = sum(shape.kind == kind for shape in scene.shapes)
        return f"how many {plural(kind)}?", str(total)
    color = lots.choice(scene.shapes).color if seen else lots.choice(COLORS)
    total = sum(shape.color == color for shape in scene.shapes)
    return f"how many {color} shapes?", str(total)


def _color(scene: Scene, lots: random.Random) -> _Drawn:
    shape = lots.choice(alone(scene, "kind"))
    return f"what color is the {shape.kind}?", shape.color


def _shape(scene: Scene, lots: random.Random) -> _Drawn:
    shape = lots.choice(alone(scene, "color"))
    return f"what shape is {shape.color}?", shape.kind


def _spatial(scene: Scene, lots: random.Random) -> _Drawn:
    one, other = lots.sample(alone(scene, "kind", "color"), 2)
    axis = 0 if lots.random() < 0.5 else 1
    offset = one.center[axis] - other.center[axis]
    if abs(offset) < _MIN_OFFSET:
        return None
    before = lots.random() < 0.5
    named = (("left of", "right of"), ("above", "below"))[axis][0 if before else 1]
    answer = "yes" if before == (offset < 0) else "no"
    return f"is the {one.color} {one.kind} {named} the {other.color} {other.kind}?", answer


def _where(scene: Scene, lots: random.Random) -> _Drawn:
    shape = lots.choice(alone(scene, "kind", "color"))
    x, y = 3 * shape.center[0] / scene.width, 3 * shape.center[1] / scene.height
    if min(abs(third - edge) for third in (x, y) for edge in (1, 2)) < _BORDER:
        return None
    column, row = ("left", "center", "right")[int(x)], ("top", "middle", "bottom")[int(y)]
    return f"where is the {shape.color} {shape.kind}?", f"{row} {column}"


def _number(scene: Scene, lots: random.Random) -> _Drawn:
    assert scene.number is not None
    return "what number is shown?", " ".join(str(digit) for digit in scene.number.digits)


def _word(scene: Scene, lots: random.Random) -> _Drawn:
    assert scene.word is not None
    return "what word is shown?", scene.word.text


def _chart(scene: Scene, lots: random.Random) -> _Drawn:
    assert scene.chart is not None
    bars = scene.chart.bars
    highest = max(bar.value for bar in bars)
    tallest = [bar for bar in bars if bar.value == highest]
    if lots.random() < 0.25 and len(tallest) == 1:
        return "which bar is tallest?", tallest[0].color
    bar = lots.choice(bars)
    return f"what is the value of the {bar.color} bar?", str(bar.value)


_FAMILIES: Final[dict[Family, tuple[Callable[[Scene], int], Callable[..., _Drawn]]]] = {
    "exist": (lambda scene: 1, _exist),
    "color": (lambda scene: 2 if alone(scene, "kind") else 0, _color),
    "shape": (lambda scene: 1 if alone(scene, "color") else 0, _shape),
    "count": (lambda scene: 2, _count),
    "spatial": (lambda scene: 2 if len(alone(scene, "kind", "color")) > 1 else 0, _spatial),
    "where": (lambda scene: 1 if alone(scene, "kind", "color") else 0, _where),
    "number": (lambda scene: 2 if scene.number else 0, _number),
    "word": (lambda scene: 2 if scene.word else 0, _word),
    "chart": (lambda scene: 3 if scene.chart else 0, _chart),
}
"""How often a family is drawn, relative to the others (0: it does not suit the scene), and how."""


def plural(kind: str) -> str:
    """Spell the plural of a shape, as in "how many crosses?"."""
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"
