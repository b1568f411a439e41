"""Make tasks of other shapes than the shipped LLaVA's: pictures of any size, several, short videos.

    task = draw_task("several", seed=7, number=0, material=load_material(split="test"))
    task.items[0].frames[0], task.questions[0].text, task.questions[0].answer

A task is a function of (kind, seed, number, size, quotas) alone. What a picture shows is drawn by
`scene.py` and painted by `render.py`, as the first generator's is; questions about one picture are
`questions.py`'s and two more families. `film.py` makes videos. Leaves out the text around
pictures (`filler.py`) and what a token of a picture shows (`lab/train/labels.py`).
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from era_vllm.lab.media import Medium, of_frames
from era_vllm.lab.synth.assets import Material
from era_vllm.lab.synth.film import ORDINALS, Item, draw_film
from era_vllm.lab.synth.questions import FAMILIES, Question, TaskFamily, alone, ask_about, plural
from era_vllm.lab.synth.render import paint
from era_vllm.lab.synth.scene import STANDARD, Plan, Scene, Shape, draw_scene

Kind = Literal["picture", "several", "film", "standard"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
SIDE_STEP: Final = 16
"""Sides of pictures are multiples of it: a visual token's pixels."""
TASK_FAMILIES: Final[tuple[TaskFamily, ...]] = (
    *FAMILIES, "relation", "reading", "which", "indexed", "motion", "moment"
)  # fmt: skip
YES_NO: Final[frozenset[TaskFamily]] = frozenset({"exist", "spatial"})
"""Families that half of the answers are right in by chance."""
QUOTAS: Final[Mapping[TaskFamily, int]] = {
    "exist": 2, "color": 1, "shape": 1, "count": 2, "spatial": 2, "where": 2, "number": 1,
    "word": 1, "chart": 2, "relation": 2, "reading": 2, "which": 4, "indexed": 4,
}  # fmt: skip
"""At most so many questions of a family a task; families of videos have their own."""
_ASPECT: Final = 1.8
_LARGE, _MEDIUM = 112 * 112, 88 * 88
_CLEAR: Final = 14  # pixels: as far as `spatial` wants two shapes apart


@dataclass(frozen=True, slots=True)
class Task:
    """Pictures or a video, and questions that each are about all of them."""

    kind: Kind
    items: tuple[Item, ...]
    questions: tuple[Question, ...]

    @property
    def media(self) -> tuple[Medium, ...]:
        """Return its files, made anew."""
        return tuple(of_frames(item.frames, item.seconds) for item in self.items)


def draw_task(
    kind: Kind,
    seed: int,
    number: int,
    material: Material,
    tokens: tuple[int, int] | None = None,
    quotas: Mapping[TaskFamily, int] = QUOTAS,
) -> Task:
    """Draw a task. About 2 ms a picture.

    Args:    kind: "picture": one; "several": two or three; "film": a video of 3 or 4 moments;
                   "standard": one as the shipped LLaVA's, with the first nine families.
             tokens: fewest and most visual tokens (16 x 16 pixels) a picture; None: the kind's.
             quotas: at most so many questions of a family.
    Returns: Task. Its questions may be none, where a picture suits none.
    """
    lots = random.Random(f"task {kind} {seed} {number}")
    sizes = SIZES[kind] if tokens is None else tokens
    if kind == "film":
        item, questions = draw_film(lots, material, *_sides(lots, sizes))
        return Task(kind, (item,), questions)
    count = lots.randint(2, 3) if kind == "several" else 1
    scenes = [
        draw_scene(
            lots, material, STANDARD if kind == "standard" else _plan(lots, sizes, count > 1)
        )
        for _ in range(count)
    ]
    items = tuple(Item((paint(scene, material),), (scene,), ()) for scene in scenes)
    ask = _about_several if kind == "several" else _about_one
    questions = ask(scenes, lots, quotas)
    lots.shuffle(questions)
    return Task(kind, items, tuple(questions))


def draw_tasks(
    kinds: Sequence[Kind],
    seed: int,
    count: int,
    material: Material,
    quotas: Mapping[TaskFamily, int] = QUOTAS,
) -> list[Task]:
    """Draw so many tasks of each kind; those without a question are left out."""
    drawn = (
        draw_task(kind, seed, number, material, quotas=quotas)
        for kind in kinds
        for number in range(count)
    )
    return [task for task in drawn if task.questions]


SIZES: Final[Mapping[Kind, tuple[int, int]]] = {
    "picture": (36, 110),
    "several": (16, 49),
    "film": (25, 42),
    "standard": (144, 144),
}
"""Fewest and most visual tokens of a picture, or of a moment."""


def _sides(lots: random.Random, tokens: tuple[int, int]) -> tuple[int, int]:
    """Draw the width and height of a picture, in pixels."""
    while True:
        area, aspect = lots.uniform(*tokens), _ASPECT ** lots.uniform(-1, 1)
        width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if tokens[0] <= width * height <= tokens[1]:
            return width * SIDE_STEP, height * SIDE_STEP


def _plan(lots: random.Random, tokens: tuple[int, int], among_several: bool) -> Plan:
    """Say what a picture of a drawn size may hold: a large word or small signs, never both."""
    width, height = _sides(lots, tokens)
    signs = 0 if lots.random() < 0.5 else 1
    if width * height >= _LARGE:
        return Plan(width, height, 0.45, 0.6, 0.9 - 0.9 * signs, (signs, 4 * signs), (2, 7))
    if width * height >= _MEDIUM:
        chart = 0.15 if among_several else 0.35
        return Plan(width, height, chart, 0.4, 0.7 - 0.7 * signs, (signs, 2 * signs), (2, 5))
    return Plan(width, height, 0.0, 0.3, 0.4, (0, 0), (1, 3))


def _about_one(
    scenes: list[Scene], lots: random.Random, quotas: Mapping[TaskFamily, int]
) -> list[Question]:
    (scene,) = scenes
    found: list[Question] = []
    for family in FAMILIES:
        found += ask_about(scene, lots, (family,), quotas.get(family, 0))
    named = alone(scene, "kind", "color")
    pairs = [(one, other) for one in named for other in named if one is not other]
    relations = [asked for pair in pairs if (asked := _relation(*pair)) is not None]
    found += lots.sample(relations, min(len(relations), quotas.get("relation", 0)))
    readings = [
        Question("reading", f"what does the {sign.color} sign say?", sign.text)
        for sign in scene.signs
    ]
    return found + lots.sample(readings, min(len(readings), quotas.get("reading", 0)))


def _relation(one: Shape, other: Shape) -> Question | None:
    dx, dy = (a - b for a, b in zip(one.center, other.center, strict=True))
    if max(abs(dx), abs(dy)) < max(_CLEAR, 1.6 * min(abs(dx), abs(dy))):
        return None
    sideways = abs(dx) > abs(dy)
    answer = ("left" if dx < 0 else "right") if sideways else ("above" if dy < 0 else "below")
    text = f"where is the {one.color} {one.kind} from the {other.color} {other.kind}?"
    return Question("relation", text, answer)


def _about_several(
    scenes: list[Scene], lots: random.Random, quotas: Mapping[TaskFamily, int]
) -> list[Question]:
    which: list[Question] = []
    indexed: list[Question] = []
    shown = [_things(scene) for scene in scenes]
    for index, (scene, things) in enumerate(zip(scenes, shown, strict=True)):
        elsewhere = set().union(*(other for other in shown if other is not things))
        which += [
            Question("which", f"which picture shows {thing}?", ORDINALS[index])
            for thing in sorted(things - elsewhere)
        ]
        asked = [(f"what color is the {one.kind}", one.color) for one in alone(scene, "kind")]
        asked += [(f"what shape is {one.color}", one.kind) for one in alone(scene, "color")]
        asked.append(("how many shapes are", str(len(scene.shapes))))
        counts = sorted(Counter(shape.kind for shape in scene.shapes).items())
        asked += [(f"how many {plural(kind)} are", str(n)) for kind, n in counts if n > 1]
        if scene.word:
            asked += [("what word is shown", scene.word.text)] * 3
        if scene.number:
            asked += [("what number is shown", " ".join(map(str, scene.number.digits)))] * 3
        indexed += [
            Question("indexed", f"{text} in the {ORDINALS[index]} picture?", answer)
            for text, answer in asked
        ]
    chosen = lots.sample(which, min(len(which), quotas.get("which", 0)))
    chosen += lots.sample(indexed, min(len(indexed), quotas.get("indexed", 0)))
    return list(dict.fromkeys(chosen))


def _things(scene: Scene) -> set[str]:
    """Say what a picture shows, as `which` asks for it."""
    things = {f"a {shape.color} {shape.kind}" for shape in scene.shapes}
    things |= {f"a {shape.kind}" for shape in scene.shapes}
    if scene.word:
        things.add(f"the word {scene.word.text}")
    if scene.number:
        things.add("a number")
    if scene.chart:
        things.add("a chart")
    return things
