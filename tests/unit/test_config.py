"""EraConfig: ranges, nearest names, round trip, fingerprint, and the number of anchors."""

import json
import math
from dataclasses import fields, replace
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from era_vllm.attention.bias_store import STORES, make_store
from era_vllm.config import DEFAULT_PRUNING_RATE, BiasStoreName, EraConfig, encoder_layer
from era_vllm.errors import ConfigError, UnsupportedError

OTHER: dict[str, object] = {
    "pruning_rate": 0.5,
    "min_pruning_rate": 0.1,
    "max_pruning_rate": 0.9,
    "levels": {"off": 0, "mine": 0.3, "strong": 0.6},
    "min_anchors": 4,
    "max_segment": 1024,
    "frames_per_segment": 4,
    "policy": "era",
    "policy_options": {"ridge": 0.2},
    "merge": False,
    "bias": False,
    "attention_layer": -1,
    "attention_queries": "cls",
    "bias_store": "value_column",
    "bias_columns": 1,
    "positions": "compact",
    "separators": "tile_rows",
    "allow_extrapolation": True,
    "gamma": [[1.0, 0.5], [0.9, 0.0]],
    "scout": 2,
    "scout_prefix": [1, 7],
    "scout_suffix": [8],
    "scout_injection": True,
    "question_aware": True,
    "question_reduction": "mean",
}
"""Another valid value for every setting."""
NOT_HASHED = {
    *("pruning_rate", "min_pruning_rate", "max_pruning_rate", "levels"),
    "allow_extrapolation",
}
"""Each image's own rate is part of its identity instead; where an answer ends changes no number."""
NAN, INF = float("nan"), float("inf")


def test_every_setting_has_another_value_here() -> None:
    assert set(OTHER) == {field.name for field in fields(EraConfig)}
    plain = EraConfig().as_dict()
    assert all(plain[name] != value for name, value in OTHER.items())


@pytest.mark.parametrize("name", OTHER)
def test_fingerprint_covers_every_setting_but_the_rates(name: str) -> None:
    changed = EraConfig.parse({name: OTHER[name]}).fingerprint()
    assert (changed == EraConfig().fingerprint()) == (name in NOT_HASHED)


def test_fingerprint_does_not_depend_on_the_order_of_options() -> None:
    one = {"policy_options": {"search": "dpp", "temperature": 2.0}}
    other = {"policy_options": {"temperature": 2.0, "search": "dpp"}}
    assert EraConfig.parse(one) == EraConfig.parse(other)
    assert EraConfig.parse(one).fingerprint() == EraConfig.parse(other).fingerprint()


def test_fingerprints_of_all_single_changes_differ() -> None:
    prints = {EraConfig.parse({name: value}).fingerprint() for name, value in OTHER.items()}
    assert len(prints) == len(OTHER) - len(NOT_HASHED) + 1, "those give the default's"


@pytest.mark.parametrize("raw", [{}, OTHER, *({name: value} for name, value in OTHER.items())])
def test_round_trip_through_json(raw: dict[str, object]) -> None:
    config = EraConfig.parse(raw)
    assert EraConfig.parse(json.loads(json.dumps(config.as_dict()))) == config
    assert config.as_dict().items() >= raw.items()


def test_unknown_settings_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'prunning_rate'; did you mean 'pruning_rate'"):
        EraConfig.parse({"prunning_rate": 0.5})
    with pytest.raises(ConfigError, match="unknown era setting '3'"):
        EraConfig.parse({3: 1})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("pruning_rate", [-0.01, 0.951, 1, NAN, INF, "0.5", None, True, [0.5]]),
        ("min_pruning_rate", [-0.01, 0.951, 1, NAN, "0", None, False]),
        ("max_pruning_rate", [-0.01, 1, 1.0, 2, NAN, -INF, "0.5", None, False]),
        (
            "levels",
            [None, 3, "off", [], {}, {"off": 0}, {"strong": 0.9}, {"off": 0.1, "strong": 1}],
        ),
        ("levels", [{"off": 0, "strong": 0.9, "x": x} for x in (1, -0.1, NAN, "0.5", None, True)]),
        ("levels", [{"off": 0, "strong": 0.9, x: 0.5} for x in ("", 3)]),
        ("levels", [{"off": 0.1, "strong": 0.9}, [["off", 0], ["strong", 0.9]]]),
        ("min_anchors", [0, -1, 1.0, "1", None, True]),
        ("merge", [0, 1, "true", None]),
        ("bias", [0, 1, "true", None]),
        ("allow_extrapolation", [0, 1, "true", None]),
        ("question_aware", [0, 1, "true", None]),
        ("question_reduction", ["Largest", "max", "", None, 1]),
        ("policy", [None, 3, b"era", ["era"]]),
        ("bias_store", [None, 3, "key_column", "Key_Columns", ["key_columns"]]),
        ("attention_layer", [1.0, "last", True, [1]]),
        ("attention_queries", ["ALL", "", None, 1, ["all"]]),
        ("bias_columns", [0, 5, -1, 1.0, "2", True]),
        ("positions", ["Original", "", None, 1]),
        ("gamma", [-0.1, NAN, INF, "1", True, {}, [], [[]], [1, True], [1, -1], [1, [1]]]),
        ("gamma", [[[1], [1, 1]], [[1], []], [[1], [NAN]], [[[1]]], [["1"]], [None], [[1], None]]),
        ("policy_options", [0, False, "", "ab", ["ab"], [["a", 1]], [1], 3, {1: 2}]),
        ("policy_options", [{"a": value} for value in (None, [1], {"b": 1}, NAN, INF)]),
    ],
)
def test_bad_values_are_refused_by_name(name: str, bad: list[object]) -> None:
    for value in bad:
        with pytest.raises(ConfigError, match=f"era setting {name}.*got .*allowed: "):
            EraConfig.parse({name: value})


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("pruning_rate", [0, 0.0, 0.95]),
        ("min_pruning_rate", [0, 0.3, 0.95]),
        ("max_pruning_rate", [0, 0.5, 0.999]),
        ("levels", [{"off": 0, "strong": 0.999}, {"off": 0.0, "strong": 0, "ganz schön": 0.5}]),
        ("min_anchors", [1, 1000]),
        ("attention_layer", [None, -2, 0, 22]),
        ("attention_queries", ["all", "cls"]),
        ("bias_columns", [None, 1, 4]),
        ("gamma", [None, 0, 1, 2.5, [0.5], [0, 1.5], [[1]], [[0, 2], [1, 1]]]),
        ("policy_options", [{}, {"a": True, "b": 1, "c": 0.5, "d": "x"}]),
    ],
)
def test_ends_of_ranges_are_allowed(name: str, good: list[object]) -> None:
    for value in good:
        assert EraConfig.parse({name: value}).as_dict()[name] == value


def test_numbers_of_numpy_become_plain_ones() -> None:
    """Which JSON knows, and so vLLM's command line and every cache key."""
    raw = {
        "pruning_rate": np.float32(0.5),
        "min_anchors": np.int64(4),
        "attention_layer": np.int8(-3),
        "policy_options": {"mass_scale": np.float16(0.5), "n": np.int32(2)},
        "gamma": [np.float32(0.5), np.int64(1)],
    }
    plain = EraConfig(0.5, min_anchors=4, attention_layer=-3, gamma=(0.5, 1.0))
    options = (("mass_scale", 0.5), ("n", 2))
    for config in (EraConfig.parse(raw), replace(EraConfig.parse(raw), min_anchors=np.uint8(4))):
        assert config == replace(plain, policy_options=options)
        assert json.loads(json.dumps(config.as_dict())) == config.as_dict()
    assert type(EraConfig().check_rate(np.float32(0.5))) is float
    for bad in (np.float32("nan"), np.bool_(True), np.array([0.5])):
        with pytest.raises(ConfigError, match="pruning_rate: got"):
            EraConfig.parse({"pruning_rate": bad})
    with pytest.raises(ConfigError, match="min_anchors: got"):
        EraConfig.parse({"min_anchors": np.float64(1)})


def test_the_bias_stores_are_those_that_exist_and_their_columns_fit() -> None:
    assert set(get_args(BiasStoreName)) == set(STORES)
    with pytest.raises(ConfigError, match="bias_columns: got 2, allowed: 1 or null for value_col"):
        EraConfig.parse({"bias_store": "value_column", "bias_columns": 2})
    for store in STORES:
        for columns in (None, 1) if store == "value_column" else (None, 1, 2, 4):
            config = EraConfig.parse({"bias_store": store, "bias_columns": columns})
            make_store(config.bias_store, config.bias_columns, torch.float32, torch.float32)


@pytest.mark.parametrize("feature_layer", [4, -2, [1, -2]])
def test_an_encoder_layer_is_one_that_the_features_come_through(
    feature_layer: int | list[int],
) -> None:
    """Five layers, of which the first four run; counted from 1, or from -1 = the last of all."""
    found = [encoder_layer(layer, feature_layer, 5) for layer in (None, 1, 4, -2, -5)]
    assert found == [4, 1, 4, 4, 1]
    for layer in (0, 5, 99, -1, -6, -50):
        with pytest.raises(UnsupportedError, match=f"got {layer}, allowed: 1 to 4 or -5 to -2 "):
            encoder_layer(layer, feature_layer, 5)


def test_a_lower_maximum_takes_the_default_rate_down_but_not_an_asked_for_one() -> None:
    assert EraConfig.parse({}).pruning_rate == DEFAULT_PRUNING_RATE
    assert EraConfig.parse({"max_pruning_rate": 0}).pruning_rate == 0
    assert EraConfig.parse({"max_pruning_rate": 0.5}).pruning_rate == 0.5
    assert EraConfig.parse({"max_pruning_rate": 0.9}).pruning_rate == DEFAULT_PRUNING_RATE
    for top in (0, 0.5):
        with pytest.raises(ConfigError, match=rf"pruning_rate: got 0.6, allowed: \[0, {top}\]"):
            EraConfig.parse({"max_pruning_rate": top, "pruning_rate": 0.6})


def test_a_higher_minimum_takes_the_default_rate_up_but_not_an_asked_for_one() -> None:
    assert EraConfig.parse({"min_pruning_rate": 0.9}).pruning_rate == 0.9
    assert EraConfig.parse({"min_pruning_rate": 0.3}).pruning_rate == DEFAULT_PRUNING_RATE
    both = {"min_pruning_rate": 0.3, "max_pruning_rate": 0.4}
    assert EraConfig.parse(both).pruning_rate == 0.4
    with pytest.raises(ConfigError, match=r"pruning_rate: got 0.2, allowed: \[0.3, 0.4\]"):
        EraConfig.parse({**both, "pruning_rate": 0.2})
    with pytest.raises(ConfigError, match=r"min_pruning_rate: got 0.5, allowed: \[0, 0.4\]"):
        EraConfig.parse({**both, "min_pruning_rate": 0.5})


def test_levels_are_names_of_rates_lowest_first() -> None:
    config = EraConfig.parse({"levels": {"strong": 0.9, "b": 0.3, "a": 0.3, "off": 0}})
    assert [name for name, _ in config.levels] == ["off", "a", "b", "strong"]
    assert [config.level(rate) for rate in (0, 0.0, 0.3, 0.9, 0.5)] == [
        *("off", "off", "a", "strong", None)
    ]
    assert config == EraConfig.parse({"levels": dict(reversed(config.levels))})


def test_rates_of_single_images() -> None:
    config = EraConfig(max_pruning_rate=0.9)
    assert [config.check_rate(rate) for rate in (0, 0.5, 0.9)] == [0.0, 0.5, 0.9]
    assert math.copysign(1, config.check_rate(-0.0)) == 1, "it would have a hash of its own"
    with pytest.raises(ConfigError, match=r"got 0.1, allowed: a number in \[0.2, 0.9\]"):
        EraConfig(min_pruning_rate=0.2, max_pruning_rate=0.9).check_rate(0.1)
    assert isinstance(config.check_rate(0), float)
    for rate in (-0.1, 0.901, NAN, True, "0.5", None):
        with pytest.raises(ConfigError, match=r"got .*allowed: a number in \[0, 0.9\]"):
            config.check_rate(rate)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [
        (None, None),
        (2, ((2.0, 2.0, 2.0), (2.0, 2.0, 2.0))),
        ([2, 0.5], ((2.0, 2.0, 2.0), (0.5, 0.5, 0.5))),
        ([[1, 2, 3], [4, 5, 6]], ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))),
    ],
)
def test_exponents_of_two_layers_of_three_heads(gamma: object, expected: object) -> None:
    assert EraConfig.parse({"gamma": gamma}).exponents(2, 3) == expected


@pytest.mark.parametrize("gamma", [[1], [1, 1, 1], [[1, 1], [1, 1]], [[1, 1, 1]]])
def test_exponents_for_another_model_are_refused_with_both_counts(gamma: list[object]) -> None:
    with pytest.raises(
        ConfigError, match=rf"gamma: got {len(gamma)} layers of \d KV heads.*2 of 3"
    ):
        EraConfig.parse({"gamma": gamma}).exponents(2, 3)


@pytest.mark.parametrize(
    ("n", "rate", "expected"),
    [
        *((576, 0.778, 128), (576, 0.889, 64), (576, 0.944, 32), (144, 0.778, 32)),
        *((576, 0.0, 576), (1, 0.95, 1), (7, 0.95, 1), (0, 0.5, 0)),
        *((5, 0.5, 3), (15, 0.9, 2), (5, 0.9, 1), (2, 0.75, 1), (25, 0.94, 2)),
    ],
)
def test_number_of_anchors(n: int, rate: float, expected: int) -> None:
    assert EraConfig().num_anchors(n, rate) == expected


def test_floor_of_anchors_holds_up_to_n() -> None:
    config = EraConfig(min_anchors=10)
    assert [config.num_anchors(n, 0.95) for n in (3, 10, 100, 576)] == [3, 10, 10, 29]


@given(n=st.integers(1, 20_000), thousandths=st.integers(0, 999))
def test_number_of_anchors_rounds_the_written_rate_halves_up(n: int, thousandths: int) -> None:
    """As a person computes it from the decimal, not as floats happen to fall."""
    exact = math.floor(n * (1 - Fraction(thousandths, 1000)) + Fraction(1, 2))
    assert EraConfig().num_anchors(n, thousandths / 1000) == max(1, exact)


@given(n=st.integers(1, 5000), low=st.floats(0, 0.95), high=st.floats(0, 0.95))
def test_a_higher_rate_never_keeps_more(n: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    fewer, more = (EraConfig().num_anchors(n, rate) for rate in (high, low))
    assert 1 <= fewer <= more <= n
