"""The ``--era-*`` flags and their ``ERA_`` variables give the same settings; the flag wins."""

import argparse
import json
from dataclasses import fields

import pytest

from era_vllm.cli.options import add_era_options, era_settings, era_variables
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm_server.settings import PREFIX, ServerSettings

VALUES: dict[str, object] = {
    "pruning_rate": 0.5,
    "min_pruning_rate": 0.1,
    "max_pruning_rate": 0.9,
    "levels": {"off": 0, "strong": 0.6},
    "min_anchors": 4,
    "max_segment": 512,
    "frames_per_segment": 2,
    "policy": "dpp",
    "policy_options": {"ridge": 0.2},
    "merge": False,
    "bias": False,
    "attention_layer": -1,
    "attention_queries": "cls",
    "positions": "compact",
    "separators": "none",
    "allow_extrapolation": True,
    "bias_store": "value_column",
    "bias_columns": 1,
    "gamma": [1.0, 0.5],
    "scout": 2,
    "scout_prefix": [1, 7],
    "scout_suffix": [8],
    "scout_injection": True,
    "question_aware": True,
    "question_reduction": "mean",
}


def _said(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _settings(words: list[str], variables: dict[str, str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_era_options(parser)
    return era_settings(parser.parse_args(words), variables)


def test_every_field_has_a_flag_and_a_variable() -> None:
    assert set(VALUES) == {field.name for field in fields(EraConfig)}
    assert era_variables() == {PREFIX + name.upper() for name in [*VALUES, "calibration", "preset"]}
    of_the_front = {PREFIX + name.upper() for name in ServerSettings.model_fields}
    assert not era_variables() & of_the_front


def test_variables_say_what_flags_say() -> None:
    words = ["--era-no-merge", "--era-no-bias", "--era-option", "ridge=0.2"]
    words += ["--era-allow-extrapolation", "--era-scout-injection", "--era-question-aware"]
    for name, value in VALUES.items():
        if not isinstance(value, bool) and name != "policy_options":
            words.append(f"--era-{name.replace('_', '-')}={_said(value)}")
    variables = {PREFIX + name.upper(): _said(value) for name, value in VALUES.items()}
    assert _settings(words) == _settings([], variables) == VALUES
    assert EraConfig.parse(_settings([], variables)).as_dict() == VALUES


def test_an_option_is_json_a_number_or_a_word() -> None:
    for text, value in (
        ("0.2", 0.2),
        (".2", 0.2),
        ("true", True),
        ("mean", "mean"),
        ("nan", "nan"),
    ):
        assert _settings(["--era-option", f"ridge={text}"])["policy_options"] == {"ridge": value}


def test_the_flag_wins_and_variables_are_read_only_where_asked() -> None:
    variables = {"ERA_PRUNING_RATE": "0.5", "ERA_MERGE": "false", "ERA_VENV": "x"}
    assert _settings(["--era-pruning-rate", "0.6", "--era-merge"], variables) == {
        "pruning_rate": 0.6,
        "merge": True,
    }
    assert _settings([]) == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [("PRUNING_RATE", "half"), ("MIN_ANCHORS", "1.5"), ("LEVELS", "{off: 0}"), ("MERGE", "no")],
)
def test_a_variable_that_cannot_be_read_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"ERA_{name}: got '{text}': "):
        _settings([], {f"ERA_{name}": text})
