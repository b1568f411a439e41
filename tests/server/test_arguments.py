"""What vLLM's own parser reads from the user's flags and ours together. Starts no server."""

import json
import resource
import shlex
import socket

import pytest
from transformers import AutoTokenizer

from era_vllm.cli.main import main
from era_vllm.cli.options import DEFAULT_MODEL, DEFAULT_NAME
from era_vllm.cli.preflight import check_address, check_folders
from era_vllm.cli.serve import with_model
from era_vllm.errors import ConfigError
from era_vllm.lab import CHECKPOINT
from era_vllm.vllm_plugin.launch import plan
from era_vllm_server.app import complete, user_flags

SETTINGS = {"pruning_rate": 0.889, "policy": "dpp"}
FLAGS = ("--hf-overrides", "--additional-config")
FORMS = {
    "dotted": lambda flag: [f"{flag}.foo.bar", "8192"],
    "dotted and =": lambda flag: [f"{flag}.foo.bar=8192"],
    "JSON": lambda flag: [flag, '{"foo": {"bar": 8192}}'],
    "JSON and =": lambda flag: [
        flag.replace("-", "_").replace("__", "--") + '={"foo":{"bar":8192}}'
    ],
    "both": lambda flag: [flag, '{"a": 1}', f"{flag}.foo.bar", "8192"],
}


def finished(typed):
    """What vLLM reads at the end, the way ``era-vllm serve`` goes."""
    user = user_flags(typed)
    launch = plan(
        user.model,
        SETTINGS,
        hf_overrides=user.hf_overrides,
        additional_config=user.additional_config,
    )
    return user_flags(complete(launch, typed))


@pytest.mark.parametrize("form", FORMS)
def test_the_users_overrides_and_ours_both_arrive(form):
    own = [word for flag in FLAGS for word in FORMS[form](flag)]
    found = finished([DEFAULT_MODEL, *own, "--port", "9", "--served-model-name", "a.b"])
    assert found.hf_overrides == {
        "foo": {"bar": 8192},
        "architectures": ["EraLlavaForConditionalGeneration"],
    }
    assert found.additional_config == {"foo": {"bar": 8192}, "era": SETTINGS}
    assert found.tokenizer_mode == "era"
    assert found.served_model_name == ["a.b"]


@pytest.mark.parametrize("flag", ["--hf-over.foo", "--additional.foo"])
def test_flags_that_would_replace_ours_refuse(flag):
    with pytest.raises(ConfigError, match=r"vLLM reads \{'foo': 1\}"):
        finished([DEFAULT_MODEL, flag, "1"])


def test_a_config_file_is_merged_too(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {DEFAULT_MODEL}\nhf-overrides: '{{\"foo\": 1}}'\n")
    found = finished(["--config", str(file)])
    assert found.hf_overrides["foo"] == 1
    assert found.additional_config == {"era": SETTINGS}


@pytest.mark.parametrize(
    ("typed", "name", "kv_bytes"),
    [
        ([], [DEFAULT_NAME], 1 << 30),
        (["--served-model-name", "foo"], ["foo"], 1 << 30),
        (["--served-model-name=foo", "--port", "9"], ["foo"], 1 << 30),
        (["--served_model_name", "foo"], ["foo"], 1 << 30),
        (["--kv-cache-memory-bytes", "64M"], [DEFAULT_NAME], 64 << 20),
    ],
)
def test_without_a_model_the_sample_is_served(typed, name, kv_bytes):
    user = user_flags(with_model(typed))
    assert user.model == DEFAULT_MODEL
    assert user.served_model_name == name
    assert user.kv_cache_memory_bytes == kv_bytes


def test_a_config_file_without_a_model_serves_the_sample(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("served-model-name: foo\n")
    user = user_flags(with_model(["--config", str(file)]))
    assert (user.model, user.served_model_name) == (DEFAULT_MODEL, ["foo"])


@pytest.mark.parametrize("typed", [["M"], ["--model", "M"], ["--port", "9", "M"], ["--model=M"]])
def test_a_model_that_is_named_is_left_as_typed(typed):
    assert with_model(typed) == typed


def test_flags_that_vllm_cannot_read_end_in_one_line(capsys):
    assert main(["serve", "--config", "nothing.yaml"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("era-vllm serve: vLLM cannot read the flags: ")


def test_help_with_a_word_is_vllms(capsys):
    assert main(["serve", "--help=max-model-len"]) == 0
    assert "--max-model-len" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[""], ["--port", "9", ""], ["", "--print-command"]], ids=str)
def test_an_empty_model_is_not_the_sample(words, capsys):
    assert main(["serve", *words]) == 2
    assert "is a shell variable such as $MODEL not set?" in capsys.readouterr().err


def test_variables_are_flags_and_the_flag_wins(capsys, monkeypatch):
    monkeypatch.setenv("ERA_PRUNING_RATE", "0.5")
    monkeypatch.setenv("ERA_MIN_PRUNING_RATE", "0.1")
    monkeypatch.setenv("ERA_LEVELS", '{"off": 0, "strong": 0.6}')
    assert main(["serve", "--print-command", "--era-pruning-rate", "0.25"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    era = json.loads(words[words.index("--additional-config") + 1])["era"]
    assert (era["pruning_rate"], era["min_pruning_rate"]) == (0.25, 0.1)
    assert era["levels"] == {"off": 0, "strong": 0.6}
    monkeypatch.setenv("ERA_PRUNNING_RATE", "0.5")
    assert main(["serve", "--print-command"]) == 2
    assert "'ERA_PRUNNING_RATE'; did you mean 'ERA_PRUNING_RATE'" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_our_settings_in_a_file_of_vllms_say_where_they_go(form, capsys, tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("era-pruning-rate: 0.5\n")
    assert main(["serve", *form.format(file).split(), "--print-command"]) == 2
    said = capsys.readouterr().err
    assert "give --era-pruning-rate as a flag, or ERA_PRUNING_RATE as a variable" in said


@pytest.mark.parametrize("typed", [["--grpc"], ["--grpc-port", "9"], ["--config", "grpc.yaml"]])
def test_a_server_without_our_layer_refuses_also_on_paper(typed, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grpc.yaml").write_text("grpc: true\n")
    assert main(["serve", *typed, "--print-command"]) == 2
    assert "needed vLLM's HTTP server in Python" in capsys.readouterr().err


def _printed(capsys, *typed):
    assert main(["serve", "--print-command", *typed]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    return json.loads(words[words.index("--additional-config") + 1])["era"]


def test_a_scout_sees_what_the_servers_own_chat_template_writes(capsys, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{{ bos_token }} USER : red {% for p in messages[0].content %}"
        "{% if p.type == 'image' %}<image>{% else %} {{ p.text }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} blue ASSISTANT : {% endif %}"
    )
    decode = AutoTokenizer.from_pretrained(CHECKPOINT).decode
    reads = ["--era-policy", "dpp", "--era-scout", "1", "--chat-template", str(file)]
    settings = _printed(capsys, *reads)
    assert decode(settings["scout_prefix"]).split() == ["<s>", "USER:", "red"]
    assert "scout_suffix" not in settings
    asks = ["--era-question-aware", "--era-option", "relevance_weight=0.1"]
    assert decode(_printed(capsys, *reads, *asks)["scout_suffix"]).split() == ["blue", "ASSISTANT:"]
    assert _printed(capsys, *reads, "--era-scout-prefix", "[1]")["scout_prefix"] == [1]
    assert "scout_prefix" not in _printed(capsys, "--chat-template", str(file))
    for other, said in (("{{ 1 }}", "scout_prefix: got"), ("none", "The supplied")):
        reads[-1] = other
        assert main(["serve", "--print-command", *reads]) == 2
        assert f"--chat-template with a scout: {said}" in capsys.readouterr().err


def test_the_printed_line_is_alone_on_standard_output_and_says_why_plugins_are_named(capsys):
    assert main(["serve", "--print-command"]) == 0
    said = capsys.readouterr()
    (line,) = said.out.splitlines()
    assert "VLLM_PLUGINS=era" in line.replace("'", "")
    assert "# VLLM_PLUGINS: vLLM serves routes of plugins only where it names them" in said.err


def test_at_a_maximum_of_0_the_front_is_told_and_the_engine_is_not(capsys):
    assert main(["serve", "--print-command", "--era-max-pruning-rate", "0"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert "--tokenizer-mode" not in words and "--hf-overrides" not in words
    assert json.loads(words[words.index("--additional-config") + 1])["era"]["max_pruning_rate"] == 0
    assert "era_vllm_server.middleware.Front" in words


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--max-modle-len", "5"], "--max-modle-len 5; did you mean '--max-model-len'?"),
        (["--dtype=foo"], "invalid choice: 'foo'"),
    ],
    ids=str,
)
def test_a_flag_that_vllm_does_not_know_is_one_line(typed, said, capsys):
    assert main(["serve", *typed]) == 2
    error = capsys.readouterr().err
    assert said in error and "usage:" not in error
    assert len(error.splitlines()[-1]) < 400


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.setattr("era_vllm_server.app.serve", lambda launch, words: pytest.fail("started"))


@pytest.mark.parametrize("servers", ["1", "2"])
def test_a_port_that_is_taken_is_found_before_the_model(servers, capsys, nothing_starts):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        typed = ["--host", "127.0.0.1", "--port", port, "--api-server-count", servers]
        assert main(["serve", *typed, "--print-command"]) == 0  # perhaps for another machine
        assert main(["serve", *typed]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--host 127.0.0.1 --port {port}: cannot listen there (Address already in use)" in error


def test_a_socket_that_is_there_is_found_before_the_model(capsys, nothing_starts, tmp_path):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        assert main(["serve", "--uds", str(tmp_path / "s")]) == 2
    assert "remove the file if no server uses it" in capsys.readouterr().err
    check_address(None, 8000, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_connection_of_before_does_not_keep_the_port(tmp_path):
    """As after a restart: the closed ones linger for a minute."""
    for tries in reversed(range(3)):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port)):
                server.accept()[0].close()
        try:
            check_address("127.0.0.1", port, None)
            return
        except ConfigError:  # another program's connection may be given the port meanwhile
            if not tries:
                raise


@pytest.mark.parametrize("folder", ["/dev/full", "/proc/cache"])
def test_a_cache_folder_that_cannot_be_written_is_found_before_the_model(
    folder, capsys, nothing_starts, monkeypatch
):
    monkeypatch.setattr("vllm.envs.VLLM_CACHE_ROOT", folder, raising=False)
    assert main(["serve"]) == 2
    assert (
        f"VLLM_CACHE_ROOT: {folder} cannot take 8 MiB" in capsys.readouterr().err.splitlines()[-1]
    )


def test_a_full_cache_folder_is_said(monkeypatch, tmp_path):
    """A file that takes no more than its process may write stands for a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with pytest.raises(ConfigError, match="File too large"):
            check_folders(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_folders(str(tmp_path))
    assert not list((tmp_path / "inductor").iterdir())
