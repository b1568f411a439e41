"""How often answers are right: one scorer for every asker, and its tables.

Leaves out the asking (``asking.py``), and the command (``cli/accuracy.py``).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from era_vllm.lab.asking import Answer, Asker, Picture
from era_vllm.lab.synth.dataset import Example
from era_vllm.lab.synth.questions import FAMILIES, LEARNED_FAMILIES, Family


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
