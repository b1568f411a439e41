"""What is learnt when: the kind, number and size of a step's tasks, from what was seen so far.

All rows of a step are of one kind, so that ranks take equally long and little is padded. First the
tower alone on small pictures, then everything on small pictures, then everything on all sizes.
Leaves out what a task is (``synth/tasks.py``).
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from era_vllm.lab.synth.questions import TaskFamily
from era_vllm.lab.synth.tasks import QUOTAS, Kind

_SMALL: Final = (30, 64)
_ROWS: Final[Mapping[Kind, int]] = {"picture": 16, "several": 12, "film": 10}
_SMALL_ROWS: Final[Mapping[Kind, int]] = {"picture": 20, "several": 12, "film": 10}
_TOWER_ROWS: Final[Mapping[Kind, int]] = {"picture": 32, "several": 12, "film": 16}


@dataclass(frozen=True, slots=True)
class Lesson:
    """The tasks of a step."""

    kind: Kind
    tokens: tuple[int, int] | None
    rows: int
    with_text: bool
    quotas: Mapping[TaskFamily, int]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Numbers of tasks until which the tower learns alone, and until which pictures are small."""

    tower: int = 30_000
    small: int = 70_000
    mix: Mapping[Kind, float] = field(
        default_factory=lambda: {"picture": 0.55, "several": 0.25, "film": 0.2}
    )
    quotas: Mapping[TaskFamily, int] = field(default_factory=lambda: QUOTAS)

    def lesson(self, seed: int, step: int, seen: int) -> Lesson:
        """Return a step's tasks.

        Args:    seen: tasks before it.
        """
        lots = random.Random(f"lesson {seed} {step}")
        if seen < self.tower:
            kind: Kind = "film" if lots.random() < 0.12 else "picture"
            tokens = _SMALL if kind == "picture" else None
            return Lesson(kind, tokens, _TOWER_ROWS[kind], False, {})
        (kind,) = lots.choices(tuple(self.mix), tuple(self.mix.values()))
        small = seen < self.small
        rows = (_SMALL_ROWS if small else _ROWS)[kind]
        tokens = _SMALL if small and kind == "picture" else None
        return Lesson(kind, tokens, rows, True, self.quotas)
