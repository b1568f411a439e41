"""Print the table of a model card: held-out answers by family, as Markdown.

    python -m era_vllm.lab.train.card era_vllm/lab/checkpoint_qwen3_vl --tasks 400

Asks an exported folder in float32 with packed rows, which is what transformers answers to each
question alone (``tests/unit/lab/train``), greedily. Leaves out pruning (``cli/eval.py``).
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from era_vllm.lab.scores import Score
from era_vllm.lab.synth.questions import TaskFamily
from era_vllm.lab.synth.tasks import YES_NO, Kind
from era_vllm.lab.train.arch import ARCHS, architecture
from era_vllm.lab.train.loop import accuracy
from era_vllm.lab.train.ranks import Ranks

EXAMPLES: Final[Mapping[TaskFamily, tuple[str, str]]] = {
    "exist": ("is there a red circle?", "50"),
    "color": ("what color is the star?", "14"),
    "shape": ("what shape is green?", "14"),
    "count": ("how many blue shapes?", ""),
    "spatial": ("is the red circle left of the blue star?", "50"),
    "where": ("where is the red circle?", "11"),
    "number": ("what number is shown?", ""),
    "word": ("what word is shown?", "4"),
    "chart": ("what is the value of the red bar?", "17"),
    "relation": ("where is the red circle from the blue star?", "25"),
    "reading": ("what does the green sign say?", "4"),
    "which": ("which picture shows a red circle?", "40"),
    "indexed": ("what color is the star in the second picture?", ""),
    "motion": ("which way does the star move?", "25"),
    "moment": ("when does the circle turn red?", "42"),
}
"""A question of each family, and what a guess among its answers gets right, %."""


def table(correct: Mapping[TaskFamily, tuple[int, int]]) -> str:
    """Return right answers by family; families with yes and no stand apart from the mean."""
    lines = ["| family | example | right / asked | % | 95 % interval | chance |", "|---" * 6 + "|"]
    for family, (right, asked) in correct.items():
        share, low, high = (100 * value for value in Score(right, asked).interval)
        example, chance = EXAMPLES[family]
        lines.append(
            f"| {family} | {example} | {right} / {asked} | {share:.1f} | {low:.1f}-{high:.1f} "
            f"| {chance} |"
        )
    open_ended = [right / asked for family, (right, asked) in correct.items()
                  if family not in YES_NO]  # fmt: skip
    mean = 100 * sum(open_ended) / len(open_ended)
    return "\n".join([*lines, f"| **mean without yes/no** | | | **{mean:.1f}** | | |"])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of a folder."""
    parser = argparse.ArgumentParser(prog="python -m era_vllm.lab.train.card", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", choices=ARCHS, default="qwen3_vl")
    parser.add_argument("--tasks", type=int, default=400, help="of each kind (default 400)")
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--extra", type=int, default=0, help="words of filler before all")
    arguments = parser.parse_args(argv)
    arch = architecture(arguments.arch)
    learner = arch()
    learner.read(arguments.folder)
    counts: dict[Kind, int] = {kind: arguments.tasks for kind in arch.dev}
    print(table(accuracy(learner, Ranks(), counts, arguments.seed, arguments.extra)))


if __name__ == "__main__":
    main()
