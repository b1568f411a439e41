"""What a user's folder, terminal, environment or typing may do to the command line; no vLLM."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from era_vllm.cli import demo
from era_vllm.cli.main import main
from era_vllm.cli.options import add_era_options, era_settings, refuse_unknown_era_flags
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError, UnsupportedError
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.servers import Server, wait_for
from era_vllm.vllm_plugin.rates import effective_rates

SAMPLE = CHECKPOINT.parent / "samples" / "sample_00.png"
DEMO = """
import sys, time
from pathlib import Path
from era_vllm.cli import demo
from era_vllm.cli.main import main
from era_vllm.lab.servers import Server

def answers():
    sleep = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(100)"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", child, sleep]
    with Server("1", command, {}, Path("log")) as one, Server("2", command, {}, Path("log")) as two:
        print(one._process.pid, two._process.pid, flush=True)
        time.sleep(100)

demo._answers, demo.find_spec = answers, lambda name: True
sys.exit(main(["demo", "--fast"]))
"""
"""``era-vllm demo`` with servers whose engines sleep and ignore SIGTERM, as vLLM's may; prints the
servers' process ids, which are those of their groups."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("how", "code"),
    [(signal.SIGHUP, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)],
    ids=lambda value: str(value),
)
def test_no_server_outlives_the_demo(how: signal.Signals, code: int, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DEMO], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        servers = [int(word) for word in running.stdout.readline().split()]
        assert len(servers) == 2
        _wait(lambda: all(_running(server) >= 3 for server in servers))  # guard, server, engine
        running.send_signal(how)
        assert running.wait(20) == code
    _wait(lambda: not any(map(_running, servers)))


def _running(group: int) -> int:
    """How many processes of a group are there and not ended."""
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            found += state != "Z" and int(its_group) == group
    return found


def _wait(happens: Callable[[], bool], limit_s: float = 15) -> None:
    end = time.monotonic() + limit_s
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_hangup_that_is_ignored_stays_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under nohup."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    monkeypatch.setattr(demo, "_answers", lambda: {})
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert main(["demo", "--fast"]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == demo._stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_module_in_the_users_folder_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    help_of_serve = [*demo.MODULE, "era_vllm.cli.main", "serve", "--help"]
    ended = subprocess.run(help_of_serve, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "era-vllm serve MODEL" in ended.stdout


def test_a_server_has_no_key_that_its_caller_does_not_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("ANOTHER", "kept")
    shown = [sys.executable, "-c", "import os, json; print(json.dumps(dict(os.environ)))"]
    with (
        Server("the server", shown, {"OURS": "1"}, tmp_path / "log") as server,
        pytest.raises(UnsupportedError, match="exit code 0"),
    ):
        wait_for([server], limit_s=30)
    environment = json.loads((tmp_path / "log").read_text())
    assert "VLLM_API_KEY" not in environment
    assert (environment["ANOTHER"], environment["OURS"]) == ("kept", "1")
    assert os.environ["VLLM_API_KEY"] == "secret"


@pytest.mark.parametrize("place", ["a file", "/proc"])
def test_a_demo_that_cannot_write_says_so_before_it_starts_anything(
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").write_text("mine")
    monkeypatch.chdir(tmp_path if place == "a file" else place)
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    assert main(["demo", "--fast"]) == 2
    error = capsys.readouterr().err
    assert f"era-vllm demo: the folder {str(Path.cwd() / 'out')!r} cannot be written to" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ([], {}),
        (["--era-no-merge"], {"merge": False}),
        (["--era-no-bias", "--no-era-merge"], {"merge": False, "bias": False}),
        (["--era-no-bias", "--era-bias"], {"bias": True}),
    ],
)
def test_merge_and_bias_are_switched_off_as_the_readme_says(
    flags: list[str], settings: dict[str, object]
) -> None:
    parser = argparse.ArgumentParser()
    add_era_options(parser)
    assert era_settings(parser.parse_args(flags)) == settings


@pytest.mark.parametrize("flag", ["--era-no-merg", "--no-era-merg"])
def test_a_mistyped_switch_is_told_with_the_right_one(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{flag}e'"):
        refuse_unknown_era_flags(["--port", "9", flag])
    refuse_unknown_era_flags(["--era-no-merge", "--no-era-merge", "--era-option"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        *(([f"--era-attention-layer={n}"], "-5 to -2") for n in (99, -50, 0, 5, -1)),
        (["--era-bias-store", "key_column"], "allowed: 'key_columns' or 'value_column'"),
        (["--era-bias-store", "value_column", "--era-bias-columns", "2"], "allowed: 1 or null"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_inspect_refuses_what_the_engine_refuses(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(SAMPLE), "--out", str(tmp_path / "kept.png"), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("era-vllm inspect: ")
    assert said in error
    assert not (tmp_path / "kept.png").exists()


@pytest.mark.parametrize("key", ["pruning_rate", "pruning-rates", "prunning_rate", "Era", "era_"])
def test_a_misspelt_rate_is_refused_and_other_arguments_are_not(key: str) -> None:
    config = EraConfig()
    with pytest.raises(ConfigError, match=f"got '{key}', needed 'era'"):
        effective_rates({key: 0.5}, 1, config)
    others = {"era": 0.5, "video_pruning_rate": 0.1, "do_resize": False, "rate": 2, "num_crops": 4}
    assert effective_rates(others, 1, config) == [0.5]
