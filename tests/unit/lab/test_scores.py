"""Counts, means over families, and intervals that resample subjects."""

from types import SimpleNamespace

import numpy as np
import pytest

from era_vllm.lab.asking import Answer
from era_vllm.lab.scores import accuracy, agreement, count, difference, resampled
from era_vllm.lab.synth.questions import Question

RIGHT, WRONG = Answer("yes", 4), Answer("no", 4)


def subjects(number: int, families: tuple[str, ...]) -> list:
    questions = tuple(Question(family, "?", "yes") for family in families)
    return [SimpleNamespace(questions=questions) for _ in range(number)]


def test_families_count_the_same_and_yes_no_stands_apart() -> None:
    asked = subjects(10, ("color", "color", "color", "word", "exist"))
    answers = [[RIGHT, RIGHT, RIGHT, WRONG, RIGHT] for _ in asked]
    counts = count(asked, answers)
    assert counts.by_family == {"exist": (10, 10), "color": (30, 30), "word": (0, 10)}
    right, yes_no = accuracy(counts), accuracy(counts, yes_no=True)
    assert right is not None and (right.value, right.low, right.high) == (0.5, 0.5, 0.5)
    assert yes_no is not None and yes_no.value == 1.0
    assert yes_no.low == pytest.approx(0.72, abs=0.01), "all of ten right is no certainty"
    assert accuracy(count(subjects(2, ("exist",)), [[RIGHT], [RIGHT]])) is None


def test_an_interval_is_as_wide_as_its_subjects_are_few() -> None:
    """One in two of n subjects right, 5 questions each: as n questions, not as 5 n."""
    asked = subjects(100, ("color",) * 5)
    answers = [[RIGHT] * 5 if row % 2 else [WRONG] * 5 for row in range(100)]
    found = accuracy(count(asked, answers))
    assert found is not None and found.value == 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.05, abs=0.02)


def test_a_difference_is_paired() -> None:
    """Two rows that vary alike differ by what one alone got wrong, with a narrow interval."""
    asked = subjects(100, ("color",))
    one = [[RIGHT] if row % 2 else [WRONG] for row in range(100)]
    other = [[WRONG] if row == 1 else given for row, given in enumerate(one)]
    found = difference(count(asked, one), count(asked, other))
    assert found is not None
    assert found.value == pytest.approx(0.01)
    assert found.low >= 0 and found.high < 0.05
    assert difference(count(asked, one), count(asked, one)).value == 0  # type: ignore[union-attr]


def test_agreement_counts_wrong_answers_that_are_the_same() -> None:
    kinds = ("film", "film")
    found = agreement(kinds, [[WRONG, RIGHT], [WRONG, WRONG]], [[WRONG, WRONG], [WRONG, WRONG]])
    assert found.value == 0.75


def test_resamples_are_the_same_each_time_begin_with_all_and_keep_the_kinds() -> None:
    kinds = ("picture",) * 4 + ("film",) * 3
    first = resampled(kinds)
    assert (first == resampled(kinds)).all()
    assert (first[0] == 1).all()
    assert (first[:, :4].sum(1) == 4).all()
    assert (first[:, 4:].sum(1) == 3).all()
    assert np.unique(first, axis=0).shape[0] > 100
