"""READ FIRST in the lab: make pictures with questions and right answers.

    for example in generate(count=100, seed=7):
        example.image, example.questions[0].text, example.questions[0].answer

Flow of one picture: assets (photos, digits) -> scene (what is where) -> render (pixels)
-> questions. A picture is a function of the seed and its number alone, so asking for more
pictures or more questions leaves the first pictures as they were. Lots come from `random.Random`,
whose sequence Python keeps, so scenes and answers are the same everywhere; edges and JPEG photos
may differ by a shade between releases of Pillow. Leaves out: labels for training, which a `Scene`
determines.
"""

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import count as numbers
from itertools import islice
from pathlib import Path

from PIL import Image

from era_vllm.errors import ConfigError
from era_vllm.lab.media import Medium, png
from era_vllm.lab.synth.assets import Split, load_material
from era_vllm.lab.synth.questions import (
    LEARNED_FAMILIES,
    Family,
    Question,
    ask_about,
    check_families,
)
from era_vllm.lab.synth.render import paint
from era_vllm.lab.synth.scene import Scene, draw_scene


@dataclass(frozen=True, slots=True)
class Example:
    """One picture (RGB, 168 x 168), what was asked about it, and what is on it."""

    image: Image.Image
    questions: tuple[Question, ...]
    scene: Scene

    @property
    def media(self) -> tuple[Medium, ...]:
        """Return the picture as a file."""
        return (png(self.image),)


def generate(
    count: int,
    seed: int,
    backgrounds: Path | None = None,
    families: Collection[Family] = LEARNED_FAMILIES,
    questions_per_image: int = 4,
    split: Split = "test",
) -> Iterator[Example]:
    """Make pictures with questions. About 2 ms a picture, after 1 to 2 s to load photos.

    Args:    count: how many pictures.
             seed: same seed, same pictures.
             backgrounds: a folder of PNG or JPEG photos; None: the photos of the split.
             families: the kinds of question; a picture that suits none of them is passed over.
             questions_per_image: at most so many, at least one.
             split: "test" is photos and digits that the shipped checkpoint never saw.
    Returns: the examples, one by one.
    Raises:  ConfigError, at the call and not at the first picture: a bad argument, a missing
             folder, or the lab packages are not installed.
    """
    if count < 0 or questions_per_image < 1:
        raise ConfigError(
            f"count must be 0 or more and questions_per_image 1 or more, "
            f"got {count} and {questions_per_image}"
        )
    check_families(families)
    material = load_material(backgrounds, split)

    def examples() -> Iterator[Example]:
        for number in numbers():
            scene = draw_scene(random.Random(f"scene {seed} {number}"), material)
            lots = random.Random(f"questions {seed} {number}")
            questions = ask_about(scene, lots, families, questions_per_image)
            if questions:
                yield Example(paint(scene, material), questions, scene)

    return islice(examples(), count)
