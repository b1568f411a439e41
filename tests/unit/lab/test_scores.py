"""Counts, means over families, and intervals that resample subjects."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from era_vllm.lab.asking import Answer
from era_vllm.lab.scores import (
    Estimate,
    Score,
    accuracy,
    agreement,
    by_family,
    count,
    difference,
    difference_of_all,
    divergence,
    kl,
    resampled,
)
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


def test_a_score_has_a_wilson_interval() -> None:
    assert Score(45, 50).interval == pytest.approx((0.9, 0.7864, 0.9565), abs=1e-4)


def test_an_estimate_has_no_minus_before_nothing() -> None:
    assert Estimate(-0.0001, -0.02, 0.5).text() == "0.0 (-2.0 to 50.0)"
    assert Estimate(-0.0001, -0.02, 0.5).text("+.0f") == "+0 (-2 to +50)"


def test_families_have_intervals_of_their_own() -> None:
    asked = [*subjects(30, ("color", "word")), *subjects(10, ("word",))]
    answers = [[RIGHT, RIGHT if row % 2 else WRONG] for row in range(30)] + [[WRONG]] * 10
    found = by_family(count(asked, answers))
    assert list(found) == ["color", "word"]
    assert (found["color"].value, found["word"].value) == (1.0, 15 / 40)
    assert found["color"].low == pytest.approx(Score(30, 30).interval[1])
    assert found["word"].low < 15 / 40 < found["word"].high


def test_questions_are_compared_in_pairs() -> None:
    asked = subjects(100, ("color", "exist"))
    one = [[RIGHT, RIGHT]] * 100
    other = [[WRONG, RIGHT] if row < 10 else [RIGHT, RIGHT] for row in range(100)]
    found = difference_of_all(count(asked, other), count(asked, one))
    assert found.value == -0.05
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.3 / 10 / 2, abs=0.01)


def test_kl_of_lists_that_show_everything_is_kl() -> None:
    p, q = {1: 0.7, 2: 0.2, 3: 0.1}, {1: 0.1, 2: 0.2, 3: 0.7}
    logs = [{token: math.log(share) for token, share in side.items()} for side in (p, q)]
    expected = sum(p[token] * math.log(p[token] / q[token]) for token in p)
    assert kl(*logs) == pytest.approx(expected, abs=1e-5)
    assert kl(logs[0], logs[0]) == 0.0


def test_kl_gives_what_a_side_does_not_show_as_much_as_it_can_have() -> None:
    """Left of q is .4: token 2 may have .2 of it at most, as the rest is one who shares."""
    p, q = {1: math.log(0.5), 2: math.log(0.4)}, {1: math.log(0.6)}
    expected = 0.5 * math.log(0.5 / 0.6) + 0.4 * math.log(0.4 / 0.2) + 0.1 * math.log(0.1 / 0.2)
    assert kl(p, q) == pytest.approx(expected)
    small = {1: math.log(0.01)}  # and no more than the least that is shown
    expected = 0.5 * math.log(0.5 / 0.01) + 0.4 * math.log(0.4 / 0.01) + 0.1 * math.log(0.1 / 0.98)
    assert kl(p, small) == pytest.approx(expected)
    assert 0 < kl({1: -1e-9}, {2: -1e-9}) < 30, "finite where they share nothing"
    assert kl({1: 0.0, 2: -9999.0}, {1: -9999.0, 2: 0.0}) > 10


def test_divergence_is_the_mean_over_what_was_told() -> None:
    near, far = Answer("x", 1, 0, {1: -0.1, 2: -3.0}), Answer("x", 1, 0, {1: -3.0, 2: -0.1})
    kinds = ("picture", "picture")
    found = divergence(kinds, [[near], [far, RIGHT]], [[near], [near, RIGHT]])
    assert found is not None
    assert found.value == pytest.approx(kl(near.first, far.first) / 2)  # type: ignore[arg-type]
    assert divergence(kinds, [[RIGHT], [RIGHT]], [[RIGHT], [RIGHT]]) is None


def test_resamples_are_the_same_each_time_begin_with_all_and_keep_the_kinds() -> None:
    kinds = ("picture",) * 4 + ("film",) * 3
    first = resampled(kinds)
    assert (first == resampled(kinds)).all()
    assert (first[0] == 1).all()
    assert (first[:, :4].sum(1) == 4).all()
    assert (first[:, 4:].sum(1) == 3).all()
    assert np.unique(first, axis=0).shape[0] > 100
