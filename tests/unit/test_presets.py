"""Settings by name: they are what their fields say, others win, and what cannot be is said."""

import pytest

from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.policies import make_policy
from era_vllm.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_fields_say(name: str) -> None:
    config = EraConfig.parse({"preset": name})
    assert config == EraConfig.parse(PRESETS[name])
    assert config != EraConfig()
    assert EraConfig.parse(config.as_dict()) == config
    assert config.fingerprint() != EraConfig().fingerprint()
    make_policy(config)


def test_what_stands_beside_it_wins() -> None:
    config = EraConfig.parse(
        {"preset": "paper", "bias": False, "policy_options": {"profile_weight": 0.75}}
    )
    assert (config.policy, config.bias) == ("era", False)
    assert dict(config.policy_options) == {"profile_weight": 0.75, "weighting": "saliency"}
    assert EraConfig.parse({"preset": "paper", "policy": "era"}).policy == "era"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"preset": "papper"}, "unknown preset 'papper'; did you mean 'paper'?"),
        ({"preset": 3}, "preset"),
        ({"preset": "paper", "policy": "dpp"}, "has policy 'era', got 'dpp'"),
        ({"preset": "paper", "policy_options": 3}, "policy_options"),
    ],
)
def test_what_cannot_be_is_said(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EraConfig.parse(settings)
    assert said in str(caught.value)
