"""Settings of the front: flags, variables, and what of vLLM's is set with them."""

import pytest

from era_vllm.errors import ConfigError
from era_vllm.vllm_plugin.launch import Launch
from era_vllm_server.front import IMAGES, LIMITS, MIDDLEWARE, with_front
from era_vllm_server.settings import ServerSettings, refuse_unknown_variables

LAUNCH = Launch("m", {}, {})


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in (*LIMITS, "VLLM_PLUGINS", "VLLM_MAX_IMAGE_PIXELS", "VLLM_MEDIA_CONNECTOR"):
        monkeypatch.delenv(name, raising=False)


def front(*typed, shutdown=0, **flags):
    return with_front(LAUNCH, typed, ServerSettings.parse(flags), shutdown)


def test_a_flag_wins_over_a_variable_and_both_reach_other_processes(monkeypatch):
    monkeypatch.setenv("ERA_MAX_BODY_BYTES", "2048")
    monkeypatch.setenv("ERA_RETRY_AFTER_S", "7")
    settings = ServerSettings.parse({"max_body_bytes": "4096"})
    assert (settings.max_body_bytes, settings.retry_after_s) == (4096, 7)
    assert settings.variables() == {"ERA_MAX_BODY_BYTES": "4096", "ERA_RETRY_AFTER_S": "7"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_body_bytes", "3"), ("request_timeout_s", "-1"), ("retry_after_s", "soon")]
    + [("request_timeout_s", "inf"), ("drain_timeout_s", "nan"), ("image_formats", "PNG,JPG")],
)
def test_a_bad_value_refuses_by_its_flag_and_variable(name, value):
    with pytest.raises(ConfigError, match=f"--era-{name.replace('_', '-')} .or ERA_{name.upper()}"):
        ServerSettings.parse({name: value})


def test_keys_files_are_read_before_anything_starts(tmp_path):
    for name in ("api_keys_file", "metrics_key_file"):
        with pytest.raises(ConfigError, match="cannot be read"):
            front("m", **{name: tmp_path / "absent"})


def test_an_unknown_variable_refuses_with_the_nearest(monkeypatch):
    refuse_unknown_variables()
    monkeypatch.setenv("ERA_API_KEY_FILE", "x")
    with pytest.raises(ConfigError, match="ERA_API_KEYS_FILE"):
        refuse_unknown_variables()


def test_safe_defaults_are_set():
    launch, words = front("m")
    assert LIMITS.items() <= launch.environment.items()
    assert launch.environment["VLLM_MAX_IMAGE_PIXELS"] == str(2**25)
    assert launch.environment["VLLM_MEDIA_CONNECTOR"] == "era"
    assert "era" in launch.environment["VLLM_PLUGINS"].split(",")
    assert words == ["m", "--middleware", MIDDLEWARE, "--shutdown-timeout", "30", *IMAGES]


def test_the_users_own_environment_and_flags_win(monkeypatch):
    monkeypatch.setenv("VLLM_MAX_N_SEQUENCES", "5")
    monkeypatch.setenv("VLLM_PLUGINS", "foo")
    launch, words = front("m", "--limit_mm_per_prompt.image=3", shutdown=99)
    assert "VLLM_MAX_N_SEQUENCES" not in launch.environment
    assert launch.environment["VLLM_PLUGINS"] == "foo,era"
    assert words == ["m", "--limit_mm_per_prompt.image=3", "--middleware", MIDDLEWARE]
    assert IMAGES[0] not in front("--config", "c.yaml")[1]


def test_our_middleware_is_the_last_and_so_the_outermost():
    _, words = front("m", "--middleware", "theirs.Layer")
    assert [b for a, b in zip(words, words[1:], strict=False) if a == "--middleware"] == [
        "theirs.Layer",
        MIDDLEWARE,
    ]


def test_vllms_shutdown_must_outlast_the_drain():
    with pytest.raises(ConfigError, match="needed more than --era-drain-timeout-s"):
        front("m", shutdown=20)
    assert "--shutdown-timeout" not in front("m", drain_timeout_s=0)[1]
