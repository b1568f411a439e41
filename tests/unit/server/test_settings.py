"""Settings of the front: flags, variables, and what of vLLM's is set with them."""

from argparse import Namespace

import pytest

from era_vllm.errors import ConfigError, UnsupportedError
from era_vllm.vllm_plugin.launch import Launch
from era_vllm_server.front import LIMITS, MAX_HEAD_BYTES, MIDDLEWARE, with_front
from era_vllm_server.settings import ServerSettings, refuse_unknown_variables

LAUNCH = Launch("m", {}, {})


def flags(**given):
    """What vLLM's parser makes of a user's flags, as far as the front reads it."""
    names = "shutdown_timeout limit_mm_per_prompt allowed_media_domains api_key grpc grpc_port"
    nothing = dict.fromkeys([*names.split(), "h11_max_incomplete_event_size"])
    return Namespace(**nothing | given)


NOTHING = flags()
LIMIT = ["--limit-mm-per-prompt", '{"image": 16, "video": 2}']


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    others = ("VLLM_PLUGINS", "VLLM_MAX_IMAGE_PIXELS", "VLLM_MEDIA_CONNECTOR", "VLLM_API_KEY")
    for name in (*LIMITS, *others, "VLLM_USE_RUST_FRONTEND"):
        monkeypatch.delenv(name, raising=False)


def front(*typed, user=NOTHING, **own):
    return with_front(LAUNCH, typed, ServerSettings.parse(own), user)


def test_a_flag_wins_over_a_variable_and_both_reach_other_processes(monkeypatch):
    monkeypatch.setenv("ERA_MAX_BODY_BYTES", "2048")
    monkeypatch.setenv("ERA_RETRY_AFTER_S", "7")
    settings = ServerSettings.parse({"max_body_bytes": "4096"})
    assert (settings.max_body_bytes, settings.retry_after_s) == (4096, 7)
    assert settings.variables() == {"ERA_MAX_BODY_BYTES": "4096", "ERA_RETRY_AFTER_S": "7"}


def test_a_flag_wins_also_where_it_says_the_default(monkeypatch):
    """In the server's own processes, which read variables alone."""
    default = str(ServerSettings().max_body_bytes)
    monkeypatch.setenv("ERA_MAX_BODY_BYTES", "2048")
    launch, _ = front("m", max_body_bytes=default)
    for name, value in launch.environment.items():
        monkeypatch.setenv(name, value)
    assert ServerSettings.parse().max_body_bytes == int(default)


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


def test_keys_that_the_server_would_refuse_are_refused_before_anything_starts(
    tmp_path, monkeypatch
):
    """Not when the model is loaded: ``Front`` checks by the same function."""
    file = tmp_path / "keys"
    file.write_text("one")
    front("m", user=flags(api_key=["two"]), allow_image_uuid=True)
    front("m", api_keys_file=file, allow_image_uuid=True)
    with pytest.raises(ConfigError, match="--era-allow-image-uuid: .* there is none"):
        front("m", user=flags(api_key=[""]), allow_image_uuid=True)
    with pytest.raises(ConfigError, match="needed one of the two"):
        front("m", user=flags(api_key=["two"]), api_keys_file=file)
    monkeypatch.setenv("VLLM_API_KEY", "two")
    with pytest.raises(ConfigError, match="needed one of the two"):
        front("m", api_keys_file=file)


@pytest.mark.parametrize("service", ["ERA_VLLM", "ERA", "ERA_V_2"])
def test_a_kubernetes_service_of_our_name_stops_nobody(monkeypatch, service):
    """What the kubelet sets in every pod of the Service's namespace, and Docker's links."""
    address = "tcp://10.0.0.7:8000"
    for name, value in {
        "SERVICE_HOST": "10.0.0.7",
        "SERVICE_PORT": "8000",
        "SERVICE_PORT_HTTP": "8000",
        "PORT": address,
        "PORT_8000_TCP": address,
        "PORT_8000_TCP_PROTO": "tcp",
        "PORT_8000_TCP_PORT": "8000",
        "PORT_8000_TCP_ADDR": "10.0.0.7",
    }.items():
        monkeypatch.setenv(f"{service}_{name}", value)
    refuse_unknown_variables()


@pytest.mark.parametrize(
    "name", ["ERA_PORT", "ERA_VLLM_PORT", "ERA_SERVICE", "ERA_MAX_BODY_BYTE", "ERA_PORT_TCP"]
)
def test_other_variables_of_that_kind_still_refuse(monkeypatch, name):
    monkeypatch.setenv(name, "8000")
    with pytest.raises(ConfigError, match=f"unknown variable '{name}'"):
        refuse_unknown_variables()


def test_an_unknown_variable_refuses_with_the_nearest(monkeypatch):
    refuse_unknown_variables()
    monkeypatch.setenv("ERA_API_KEY_FILE", "x")
    with pytest.raises(ConfigError, match="ERA_API_KEYS_FILE"):
        refuse_unknown_variables()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ERA_API_KEYS_FILE", "", "ERA_API_KEYS_FILE: it is empty; unset it"),
        ("era_max_body_bytes", "5000", "in capitals: ERA_MAX_BODY_BYTES"),
        ("era_max_body_bites", "5", "unknown variable 'era_max_body_bites'"),
    ],
)
def test_variables_that_would_be_taken_for_something_else_refuse(monkeypatch, name, value, said):
    """An empty file of keys is no wish to ask for none."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        refuse_unknown_variables()


def test_a_variable_of_the_pruning_says_who_reads_it(monkeypatch):
    monkeypatch.setenv("ERA_PRUNING_RATE", "0.5")
    refuse_unknown_variables(frozenset({"ERA_PRUNING_RATE"}))
    with pytest.raises(ConfigError, match="ERA_PRUNING_RATE: only `era-vllm serve` reads it"):
        refuse_unknown_variables()


def test_safe_defaults_are_set():
    launch, words = front("m")
    assert LIMITS.items() <= launch.environment.items()
    assert launch.environment["VLLM_MAX_IMAGE_PIXELS"] == str(2**25)
    assert launch.environment["VLLM_MEDIA_CONNECTOR"] == "era"
    assert launch.environment["VLLM_USE_RUST_FRONTEND"] == "0"
    assert "era" in launch.environment["VLLM_PLUGINS"].split(",")
    head = ["--h11-max-incomplete-event-size", str(MAX_HEAD_BYTES)]
    assert words == ["m", "--middleware", MIDDLEWARE, *head, "--shutdown-timeout", "30", *LIMIT]


def test_the_users_own_environment_and_flags_win(monkeypatch):
    monkeypatch.setenv("VLLM_MAX_N_SEQUENCES", "5")
    monkeypatch.setenv("VLLM_PLUGINS", "foo")
    user = flags(
        shutdown_timeout=99,
        limit_mm_per_prompt={"image": 3, "video": 0},
        h11_max_incomplete_event_size=9,
    )
    launch, words = front("m", "--limit_mm_per_prompt.image=3", user=user)
    assert "VLLM_MAX_N_SEQUENCES" not in launch.environment
    assert launch.environment["VLLM_PLUGINS"] == "foo,era"
    assert words == ["m", "--limit_mm_per_prompt.image=3", "--middleware", MIDDLEWARE]


@pytest.mark.parametrize(
    ("name", "value"), [("VLLM_MEDIA_CONNECTOR", "http"), ("VLLM_USE_RUST_FRONTEND", "1")]
)
def test_a_variable_that_would_take_the_front_away_refuses(monkeypatch, name, value):
    for harmless in ("era",) if name == "VLLM_MEDIA_CONNECTOR" else ("0", ""):
        monkeypatch.setenv(name, harmless)
        front("m")
    monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedError, match=f"{name}: got '{value}', needed .*unset it"):
        front("m")


def test_the_limits_of_items_join_those_of_other_media():
    user = flags(limit_mm_per_prompt={"video": 1})
    dotted = front("m", "--limit_mm_per_prompt.video=1", user=user)[1]
    assert dotted[-2:] == ["--limit-mm-per-prompt.image", "16"]
    assert front("m", "--config", "c.yaml", user=user)[1][-1] == '{"video": 1, "image": 16}'
    user = flags(limit_mm_per_prompt={"audio": 1})
    dotted = front("m", "--limit-mm-per-prompt.audio=1", user=user)[1]
    flag = "--limit-mm-per-prompt"
    assert dotted[-4:] == [f"{flag}.image", "16", f"{flag}.video", "2"]


@pytest.mark.parametrize("name", ["https://a.org", "a.org/x", "a.org:80", "*.a.org", "", "u@a.org"])
def test_a_domain_that_no_url_can_be_of_refuses(name):
    front("m", user=flags(allowed_media_domains=["a.org", "münchen.de", "127.0.0.1"]))
    with pytest.raises(ConfigError, match="--allowed-media-domains: got .* needed a name alone"):
        front("m", user=flags(allowed_media_domains=["a.org", name]))


def test_our_middleware_is_the_last_and_so_the_outermost():
    _, words = front("m", "--middleware", "theirs.Layer")
    assert [b for a, b in zip(words, words[1:], strict=False) if a == "--middleware"] == [
        "theirs.Layer",
        MIDDLEWARE,
    ]


def test_vllms_shutdown_must_outlast_the_drain():
    with pytest.raises(ConfigError, match="needed more than --era-drain-timeout-s"):
        front("m", user=flags(shutdown_timeout=20))
    assert "--shutdown-timeout" not in front("m", drain_timeout_s=0)[1]
