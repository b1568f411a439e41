"""What is learnt when: the kind, number and size of a step's tasks, from what was seen so far.

All rows of a step are of one kind, of about one size and about equally wordy, so that ranks take
equally long and little is padded. First the
tower alone on small pictures, then everything on small pictures, then everything on all sizes; a
share of later steps is the tower's alone.
Leaves out what a task is (``synth/tasks.py``) and each architecture's numbers.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from era_vllm.lab.synth.questions import TaskFamily
from era_vllm.lab.synth.tasks import QUOTAS, SIZES, Kind

SMALL: Final = (30, 64)
"""Fewest and most visual tokens of a small picture."""
_WINDOW: Final = 1.25
_WORDY: Final = 0.12


@dataclass(frozen=True, slots=True)
class Lesson:
    """The tasks of a step; `rows` a rank."""

    kind: Kind
    tokens: tuple[int, int]
    rows: int
    with_text: bool
    quotas: Mapping[TaskFamily, int]
    wordy: bool
    """Whether text stands before pictures and questions."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Kinds of tasks with the share of steps that each has, and the rows of a step."""

    share: Mapping[Kind, float]
    rows: Mapping[Kind, int]
    small: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """Stages, and how many tasks the tower learns alone from, and pictures are small until."""

    tower: int
    small: int
    alone: Stage
    first: Stage
    then: Stage
    still_alone: float = 0.0
    """Share of later steps in which the tower learns alone: thrice as many pictures in the time."""
    quotas: Mapping[TaskFamily, int] = field(default_factory=lambda: QUOTAS)

    def lesson(self, seed: int, step: int, seen: int) -> Lesson:
        """Return a step's tasks.

        Args:    seen: tasks before it.
        """
        lots = random.Random(f"lesson {seed} {step}")
        with_text = seen >= self.tower and lots.random() >= self.still_alone
        stage = (self.first if seen < self.small else self.then) if with_text else self.alone
        (kind,) = lots.choices(tuple(stage.share), tuple(stage.share.values()))
        fewest, most = SMALL if stage.small and kind == "picture" else SIZES[kind]
        start = lots.uniform(fewest, max(fewest, most / _WINDOW - 2))
        tokens = (int(start), min(most, int(start * _WINDOW) + 3))
        quotas = self.quotas if with_text else {}
        wordy = lots.random() < _WORDY
        return Lesson(kind, tokens, stage.rows[kind], with_text, quotas, wordy)
