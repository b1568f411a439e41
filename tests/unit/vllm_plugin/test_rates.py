"""A prompt's rates, in each form that they may have."""

import re

import pytest

from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.vllm_plugin.rates import effective_rates, has_rates, question_aware, questions

CONFIG = EraConfig(pruning_rate=0.6)
ITEMS = {"image": 2, "video": 1}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"image": [0.6, 0.6], "video": [0.6]}),
        (0.5, {"image": [0.5, 0.5], "video": [0.5]}),
        ([0.5, 0.8], {"image": [0.5, 0.8], "video": [0.6]}),
        ({"video": 0.9}, {"image": [0.6, 0.6], "video": [0.9]}),
        ({"image": [0.5, 0.8], "video": [0.9]}, {"image": [0.5, 0.8], "video": [0.9]}),
    ],
)
def test_every_form(given: object, expected: dict[str, list[float]]) -> None:
    assert effective_rates({"era": given}, ITEMS, CONFIG) == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([0.5], "got 1 pruning rates for 2 images"),
        ({"video": [0.5, 0.5]}, "got 2 pruning rates for 1 videos"),
        ({"audio": 0.5}, "got 'audio', allowed: image and video"),
        ("strong", "got 'strong', allowed: a number"),
        ({"image": 1.5}, "got 1.5, allowed: a number"),
    ],
)
def test_what_is_refused(given: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        effective_rates({"era": given}, ITEMS, CONFIG)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([0.0, 0.0], 'needed one number, or lists by modality: {"video": [...]}'),
        ([7, "x"], "got a list"),
        ({"image": "x"}, "pruning_rate"),
        ({"image": 2.0}, "pruning_rate"),
        ({"image": [0.5]}, "got 1 pruning rates for 0 images"),
    ],
    ids=str,
)
def test_rates_of_what_a_prompt_does_not_hold_are_no_typing_error_unseen(
    given: object, said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        effective_rates({"era": given}, {"video": 2}, CONFIG)


def test_a_rate_for_both_may_meet_one() -> None:
    assert effective_rates({"era": 0.5}, {"video": 2}, CONFIG) == {"video": [0.5, 0.5]}
    both = {"image": 0.1, "video": [0.5, 0.9]}
    assert effective_rates({"era": both}, {"video": 2}, CONFIG) == {"video": [0.5, 0.9]}


ASKING = EraConfig(policy="cdpruner", question_aware=True)


@pytest.mark.parametrize(
    ("given", "aware", "rates"),
    [
        (None, True, False),
        (0.5, True, True),
        ({"image": 0.5}, True, True),
        ({"question_aware": False}, False, False),
        ({"image": [0.5, 0.5], "question_aware": False}, False, True),
    ],
)
def test_beside_the_rates_stands_whether_a_question_counts(
    given: object, aware: bool, rates: bool
) -> None:
    kwargs = {"era": given}
    assert question_aware(kwargs, ASKING) is aware and has_rates(kwargs) is rates
    assert not question_aware(kwargs, CONFIG)
    found = effective_rates(kwargs, {"image": 2}, ASKING)["image"]
    assert found == [0.5 if rates else ASKING.pruning_rate] * 2
    assert questions(kwargs) == {}


def test_questions_are_the_renderer_s_to_tell() -> None:
    told = {"era": {"image": [0.5], "questions": {"image": [(3, 4)]}}}
    assert questions(told) == {"image": [(3, 4)]}
    assert effective_rates(told, {"image": 1}, ASKING) == {"image": [0.5]}
    with pytest.raises(ConfigError, match="got 'questions', which are the prompt's own text"):
        question_aware(told, ASKING)
    with pytest.raises(ConfigError, match="era.question_aware: got 3, allowed: true or false"):
        question_aware({"era": {"question_aware": 3}}, ASKING)
    with pytest.raises(ConfigError, match="started with --era-question-aware"):
        question_aware({"era": {"question_aware": True}}, CONFIG)
