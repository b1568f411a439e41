"""What a user's folder, terminal, environment or typing may do to the command line; no vLLM."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest

from era_vllm.cli import demo, preflight
from era_vllm.cli.main import main
from era_vllm.cli.options import add_era_options, era_settings, refuse_unknown_era_flags
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError, UnsupportedError
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.servers import Server, wait_for
from era_vllm.vllm_plugin.rates import effective_rates

SAMPLE = CHECKPOINT.parent / "samples" / "sample_00.png"


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
        effective_rates({key: 0.5}, {"image": 1}, config)
    others = {"era": 0.5, "video_pruning_rate": 0.1, "do_resize": False, "rate": 2, "num_crops": 4}
    assert effective_rates(others, {"image": 1}, config) == {"image": [0.5]}


@pytest.mark.parametrize("words", [["eval", "--count", "2", "--tasks", "standard"], ["ecl"]])
def test_what_draws_is_refused_at_once_where_nothing_can(
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    assert main([*words, "--out", str(tmp_path / "new")]) == 2
    assert "needs the package matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
