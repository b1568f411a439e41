"""A prompt's rates, in each form that they may have."""

import re

import pytest

from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.vllm_plugin.rates import effective_rates

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
