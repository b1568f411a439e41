"""How often answers are right: one scorer for every asker, and its tables.

    python -m era_vllm.lab.accuracy --pictures 100 --policies era dpp uniform --rates 0 .778 .889
    python -m era_vllm.lab.accuracy --by-family --pictures 400 --seed 12345 --questions-per-image 8

Asks plain transformers; ``era-vllm accuracy`` (``cli/accuracy.py``) asks the real engine the same.
The second is the table of the model card. Leaves out the asking (``asking.py``).
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.asking import Answer, Asker, Picture, TransformersAsker
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.synth.dataset import Example, generate
from era_vllm.lab.synth.questions import FAMILIES, LEARNED_FAMILIES, Family

RATES = (0.0, 0.5, 0.778, 0.889, 0.944)


@dataclass(frozen=True, slots=True)
class Score:
    """How many answers were exactly right."""

    right: int
    asked: int

    @property
    def interval(self) -> tuple[float, float, float]:
        """Return the fraction right and its 95 % Wilson interval."""
        z, n = 1.96, self.asked
        p = self.right / n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return p, middle - half, middle + half


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The score of one policy at one rate."""

    policy: str
    positions: str
    pruning_rate: float
    tokens: int
    score: Score

    def as_dict(self) -> dict[str, object]:
        """Return JSON values."""
        flat = {**asdict(self), **asdict(self.score), "interval": self.score.interval}
        del flat["score"]
        return flat


def score(pictures: Sequence[Picture], answers: Sequence[Sequence[Answer]]) -> dict[Family, Score]:
    """Count exact matches by family.

    Args:    answers: what an asker returns for these pictures.
    Returns: a score for each family that was asked, in the order of FAMILIES.
    """
    matches: dict[Family, list[bool]] = defaultdict(list)
    for picture, given in zip(pictures, answers, strict=True):
        for question, answer in zip(picture.questions, given, strict=True):
            matches[question.family].append(answer.is_right(question))
    return {
        family: Score(sum(matches[family]), len(matches[family]))
        for family in FAMILIES
        if family in matches
    }


def total(scores: dict[Family, Score]) -> Score:
    """Return the score over all questions, each counting the same."""
    return Score(sum(s.right for s in scores.values()), sum(s.asked for s in scores.values()))


def mean_accuracy(scores: dict[Family, Score]) -> float:
    """Mean over the families asked, each counting the same, 0 to 1."""
    return sum(each.right / each.asked for each in scores.values()) / len(scores)


def measure(
    asker: Asker, pictures: Sequence[Picture], policy: str, positions: str, rate: float
) -> Accuracy:
    """Ask everything at the asker's rate, and score it."""
    answers = asker.ask(pictures)
    right = total(score(pictures, answers))
    return Accuracy(policy, positions, rate, answers[0][0].image_tokens, right)


def table(rows: Sequence[Accuracy]) -> str:
    """Return a Markdown table."""
    lines = [
        f"{rows[0].score.asked} questions, exact match, 95 % intervals",
        "",
        "| policy | positions | pruning rate | tokens | right |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        p, low, high = (100 * x for x in row.score.interval)
        lines.append(
            f"| {row.policy} | {row.positions} | {row.pruning_rate} | {row.tokens} | "
            f"{p:.1f} % ({low:.1f}-{high:.1f}) |"
        )
    return "\n".join(lines)


def family_table(examples: Sequence[Example], answers: Sequence[Sequence[Answer]]) -> str:
    """Write the table of the model card: all pictures, then each background apart."""
    lines = ["| family | right | asked | % |", "|---|---|---|---|"]
    lines += [
        f"| {family} | {each.right} | {each.asked} | {100 * each.right / each.asked:.1f} |"
        for family, each in score(examples, answers).items()
    ]
    lines += ["", f"mean of {', '.join(LEARNED_FAMILIES)}:"]
    photos = [example.scene.backdrop.photo for example in examples]
    for photo in (None, *sorted(set(photos))):
        kept = [index for index, own in enumerate(photos) if photo in (None, own)]
        scores = score([examples[index] for index in kept], [answers[index] for index in kept])
        learned = {family: scores[family] for family in LEARNED_FAMILIES if family in scores}
        if learned:
            lines.append(f"{photo or 'all'}: {100 * mean_accuracy(learned):.1f} %")
    return "\n".join(lines)


def main() -> None:
    """Print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(CHECKPOINT), help="default: the sample model")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--questions-per-image", type=int, default=4)
    parser.add_argument("--backgrounds", type=Path, help="a folder of photos of your own")
    parser.add_argument("--policies", nargs="+", default=["era", "dpp"])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--positions", choices=("original", "compact"), default="original")
    parser.add_argument("--no-merge", action="store_true")
    parser.add_argument("--no-bias", action="store_true")
    parser.add_argument(
        "--by-family", action="store_true", help="unpruned, every kind of question apart"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    asked = parser.parse_args()
    oracle = Oracle(asked.model, torch.bfloat16)
    families = FAMILIES if asked.by_family else LEARNED_FAMILIES
    examples = list(
        generate(asked.pictures, asked.seed, asked.backgrounds, families, asked.questions_per_image)
    )
    if asked.by_family:
        answers = TransformersAsker(oracle, EraConfig(), 0.0).ask(examples)
        print(family_table(examples, answers))
        return
    rows: list[Accuracy] = []
    for policy in asked.policies:
        config = EraConfig(
            policy=policy,
            positions=asked.positions,
            merge=not asked.no_merge,
            bias=not asked.no_bias,
            max_pruning_rate=0.999,
        )
        for rate in asked.rates:
            asker = TransformersAsker(oracle, config, rate)
            rows.append(measure(asker, examples, policy, asked.positions, rate))
    print(json.dumps([row.as_dict() for row in rows], indent=1) if asked.json else table(rows))


if __name__ == "__main__":
    main()
