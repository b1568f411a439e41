"""What answers are worth: right or not, the same or not, how far in probability; with intervals.

Questions about one subject are not independent, so that intervals resample subjects, not
questions; two rows are compared over the same subjects: a paired bootstrap, within each kind of
subject. Leaves out who is asked (``asking.py``, ``evaluation.py``) and the pages
(``eval_report.py``, ``recommend_report.py``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import eq
from typing import Any, Final

import numpy as np

from era_vllm.lab.asking import LEAST, Answer, Subject
from era_vllm.lab.synth.questions import TaskFamily
from era_vllm.lab.synth.tasks import TASK_FAMILIES, YES_NO

RESAMPLES: Final = 2000
Given = Sequence[Sequence[Answer]]
"""Answers of a row: to each subject's questions."""


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
class Counts:
    """Right answers and questions of each subject by family: [subjects, families] each."""

    right: "np.ndarray[Any, Any]"
    asked: "np.ndarray[Any, Any]"
    families: tuple[TaskFamily, ...]
    """Those that were asked, in the order of TASK_FAMILIES."""
    kinds: tuple[str, ...]
    """Of each subject: how many there are of a kind is chosen, not chance."""

    @property
    def total(self) -> Score:
        """Return right answers of all questions."""
        return Score(int(self.right.sum()), int(self.asked.sum()))

    @property
    def by_family(self) -> dict[TaskFamily, tuple[int, int]]:
        """Return right and asked."""
        pairs = zip(self.right.sum(0).tolist(), self.asked.sum(0).tolist(), strict=True)
        return dict(zip(self.families, pairs, strict=True))

    def mean(self, *, yes_no: bool = False) -> Any:
        """Return the mean over families, each counting the same, 0 to 1, in each resample.

        A family that a resample does not ask is left out of it, NaN where it asks none.

        Args:    yes_no: Over the families that chance answers half of, instead of all others.
        """
        weights = resampled(self.kinds)
        chosen = [place for place, name in enumerate(self.families) if (name in YES_NO) == yes_no]
        asked, right = (weights @ of[:, chosen] for of in (self.asked, self.right))
        there = asked > 0
        shares = np.where(there, right / np.maximum(asked, 1), 0).sum(1)
        return np.where(there.any(1), shares / np.maximum(there.sum(1), 1), np.nan)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, form: str = ".1f", unit: float = 100.0) -> str:
        """Return ``95.0 (92.9 to 96.5)``, in percent unless ``unit`` is another."""
        sign, form = ("+", form[1:]) if form.startswith("+") else ("", form)
        form = f"{sign}z{form}"  # no -0.0
        value, low, high = (format(unit * x, form) for x in (self.value, self.low, self.high))
        return f"{value} ({low} to {high})"


def count(subjects: Sequence[Subject], answers: Given) -> Counts:
    """Count exact matches."""
    shape = len(subjects), len(TASK_FAMILIES)
    right, asked = np.zeros(shape, int), np.zeros(shape, int)
    for row, (subject, given) in enumerate(zip(subjects, answers, strict=True)):
        for question, answer in zip(subject.questions, given, strict=True):
            place = TASK_FAMILIES.index(question.family)
            asked[row, place] += 1
            right[row, place] += answer.is_right(question)
    used = [place for place in range(len(TASK_FAMILIES)) if asked[:, place].any()]
    names = tuple(TASK_FAMILIES[place] for place in used)
    kinds = tuple(getattr(subject, "kind", "picture") for subject in subjects)
    return Counts(right[:, used], asked[:, used], names, kinds)


@lru_cache(maxsize=4)
def resampled(kinds: tuple[str, ...]) -> "np.ndarray[Any, Any]":
    """Return how often each subject counts in each resample; the first row is all, once each.

    Returns: [1 + RESAMPLES, subjects], as many of each kind as there are; the same for the same
        kinds. Not to be written to.
    """
    lots, named = np.random.default_rng(0), np.array(kinds)
    found = np.ones((1 + RESAMPLES, len(kinds)), int)
    for kind in dict.fromkeys(kinds):
        here = np.flatnonzero(named == kind)
        found[1:, here] = lots.multinomial(len(here), np.full(len(here), 1 / len(here)), RESAMPLES)
    return found


def estimate(values: "np.ndarray[Any, Any]") -> Estimate:
    """Return the first value with the interval of the others, NaN left out."""
    low, high = np.nanpercentile(values[1:], (2.5, 97.5))
    return Estimate(float(values[0]), float(low), float(high))


def share(values: "np.ndarray[Any, Any]", subjects: int) -> Estimate:
    """Return the same of a share, with the Wilson interval of subjects where none or all are."""
    found = estimate(values)
    if found.low < found.high or found.value not in (0.0, 1.0):
        return found
    return Estimate(*Score(round(found.value * subjects), subjects).interval)


def ratio(kinds: tuple[str, ...], sums: Any, counts: Any) -> "np.ndarray[Any, Any]":
    """Return the mean of something over questions, in each resample.

    Args:
        kinds: Of each subject.
        sums: Of that, over each subject's questions.
        counts: How many they are.
    """
    weights = resampled(kinds)
    asked = weights @ np.asarray(counts)
    return np.where(asked > 0, weights @ np.asarray(sums) / np.maximum(asked, 1), np.nan)


def accuracy(counts: Counts, *, yes_no: bool = False) -> Estimate | None:
    """Return the mean over families with its interval; None where none of them was asked."""
    if not any((name in YES_NO) == yes_no for name in counts.families):
        return None
    return share(counts.mean(yes_no=yes_no), len(counts.kinds))


def by_family(counts: Counts) -> dict[TaskFamily, Estimate]:
    """Return the share that is right of each family."""
    columns = zip(counts.families, counts.right.T, counts.asked.T, strict=True)
    return {
        name: share(ratio(counts.kinds, right, asked), int((asked > 0).sum()))
        for name, right, asked in columns
    }


def difference(counts: Counts, other: Counts) -> Estimate | None:
    """Return by how much the first is better over the same subjects, paired; None as above."""
    if not any(name not in YES_NO for name in counts.families):
        return None
    return estimate(counts.mean() - other.mean())


def difference_of_all(counts: Counts, other: Counts) -> Estimate:
    """Return the same over questions, each counting the same."""
    gained = (counts.right - other.right).sum(1)
    return estimate(ratio(counts.kinds, gained, counts.asked.sum(1)))


def alike(answers: Given, others: Given, how: Callable[[str, str], float] = eq) -> list[float]:
    """Return how alike two rows' answers to each subject are, all questions together."""
    return [sum(float(how(a.text, b.text)) for a, b in pairs) for pairs in _pairs(answers, others)]


def agreement(
    kinds: tuple[str, ...], answers: Given, others: Given, how: Callable[[str, str], float] = eq
) -> Estimate:
    """Return how alike the answers are, the mean: by default the fraction that is the same."""
    asked = list(map(len, answers))
    return share(ratio(kinds, alike(answers, others, how), asked), len(kinds))


def divergence(kinds: tuple[str, ...], answers: Given, others: Given) -> Estimate | None:
    """Return the mean KL of first tokens from the others', nats; None where none was told."""
    found = [
        [kl(b.first, a.first) for a, b in pairs if a.first and b.first]
        for pairs in _pairs(answers, others)
    ]
    if not any(found):
        return None
    return estimate(ratio(kinds, list(map(sum, found)), list(map(len, found))))


def _pairs(answers: Given, others: Given) -> list[list[tuple[Answer, Answer]]]:
    return [list(zip(*both, strict=True)) for both in zip(answers, others, strict=True)]


def kl(whole: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Return KL(whole || other) of a token, nats, where the likeliest are known of either.

    The sum of p ln(p / q) runs over every token that one of the two shows, and over one bucket
    more, the rest. A token that a side does not show has there as much as it can have, the least
    shown probability, but no more than an even share of what that side has left (with the rest as
    one of those who share). So it is 0 for the same lists, finite, and exact where all are shown.

    Args:    whole, other: token -> log-probability; of no order.
    """
    p, q = (_filled(side, whole.keys() | other.keys()) for side in (whole, other))
    return max(0.0, sum(of * math.log(of / q[token]) for token, of in p.items() if of))


def _filled(side: Mapping[int, float], union: "set[int]") -> dict[int | None, float]:
    """Return a side's probabilities of the union's tokens, and of the rest (None)."""
    known: dict[int | None, float] = {
        token: max(math.exp(value), LEAST**2) for token, value in side.items()
    }
    left = max(1.0 - sum(known.values()), LEAST)
    missing = union - side.keys()
    each = min(min(known.values()), left / (len(missing) + 1))
    return {**known, **dict.fromkeys(missing, each), None: left - each * len(missing)}
