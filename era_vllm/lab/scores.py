"""How often answers are right, family by family, with intervals: what ``era-vllm eval`` reports.

A row is one variant (policy and options) at one rate, with an answer to each question. Questions
about one picture are not independent, so that intervals resample subjects, not questions; two rows
are compared over the same subjects: a paired bootstrap, within each kind of subject. Leaves out who
is asked (``asking.py``, ``evaluation.py``), intervals of single families, how far answers are from
the unpruned ones in probability, and the page (``eval_report.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from era_vllm.lab.accuracy import Score
from era_vllm.lab.asking import Answer, Subject
from era_vllm.lab.synth.questions import TaskFamily
from era_vllm.lab.synth.tasks import TASK_FAMILIES, YES_NO

RESAMPLES: Final = 2000
_SEED: Final = 0
_TAILS: Final = (2.5, 97.5)


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
    def by_family(self) -> dict[TaskFamily, tuple[int, int]]:
        """Return right and asked."""
        pairs = zip(self.right.sum(0).tolist(), self.asked.sum(0).tolist(), strict=True)
        return dict(zip(self.families, pairs, strict=True))

    def mean(self, weights: "np.ndarray[Any, Any]", *, yes_no: bool = False) -> Any:
        """Return the mean over families, each counting the same, 0 to 1.

        Args:
            weights: How often each subject counts, [resamples, subjects].
            yes_no: Over the families that chance answers half of, instead of all others.
        Returns: [resamples]; a family that a resample does not ask is left out of it, NaN where
            it asks none.
        """
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


def count(subjects: Sequence[Subject], answers: Sequence[Sequence[Answer]]) -> Counts:
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
    return Counts(right[:, used], asked[:, used], names, kinds_of(subjects))


def kinds_of(subjects: Sequence[Subject]) -> tuple[str, ...]:
    """Return the kind of each subject."""
    return tuple(getattr(subject, "kind", "picture") for subject in subjects)


def resampled(kinds: Sequence[str]) -> "np.ndarray[Any, Any]":
    """Return how often each subject counts in each resample; the first row is all, once each.

    Returns: [1 + RESAMPLES, subjects], as many of each kind as there are; the same for the same
        kinds.
    """
    lots, named = np.random.default_rng(_SEED), np.array(kinds)
    found = np.ones((1 + RESAMPLES, len(kinds)), int)
    for kind in dict.fromkeys(kinds):
        here = np.flatnonzero(named == kind)
        found[1:, here] = lots.multinomial(len(here), np.full(len(here), 1 / len(here)), RESAMPLES)
    return found


def estimate(values: "np.ndarray[Any, Any]") -> Estimate:
    """Return the first value with the interval of the others, NaN left out."""
    low, high = np.nanpercentile(values[1:], _TAILS)
    return Estimate(float(values[0]), float(low), float(high))


def _share(values: "np.ndarray[Any, Any]", subjects: int) -> Estimate:
    """The same of a share; where none or all were seen, with the Wilson interval of subjects."""
    found = estimate(values)
    if found.low < found.high or found.value not in (0.0, 1.0):
        return found
    return Estimate(*Score(round(found.value * subjects), subjects).interval)


def accuracy(counts: Counts, *, yes_no: bool = False) -> Estimate | None:
    """Return the mean over families with its interval; None where none of them was asked."""
    if not any((name in YES_NO) == yes_no for name in counts.families):
        return None
    return _share(counts.mean(resampled(counts.kinds), yes_no=yes_no), len(counts.kinds))


def difference(counts: Counts, other: Counts) -> Estimate | None:
    """Return by how much the first is better over the same subjects, paired; None as above."""
    if not any(name not in YES_NO for name in counts.families):
        return None
    weights = resampled(counts.kinds)
    return estimate(counts.mean(weights) - other.mean(weights))


def agreement(
    kinds: Sequence[str], answers: Sequence[Sequence[Answer]], others: Sequence[Sequence[Answer]]
) -> Estimate:
    """Return the fraction of answers that are the same, right or wrong."""
    pairs = [
        [one.text == other.text for one, other in zip(*both, strict=True)]
        for both in zip(answers, others, strict=True)
    ]
    same, asked = np.array([sum(row) for row in pairs]), np.array([len(row) for row in pairs])
    weights = resampled(kinds)
    return _share((weights @ same) / (weights @ asked), len(pairs))
