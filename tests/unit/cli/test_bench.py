"""``era-vllm bench``: options, refusals, goals; ``reducer`` end to end. Starts no engine."""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from era_vllm.bench.attention import strict_ratios
from era_vllm.bench.clock import Samples
from era_vllm.bench.options import AttentionOptions, add_flags, numbers, resolved, sizes
from era_vllm.bench.serve import judged
from era_vllm.cli.main import main

pytest.importorskip("matplotlib", reason="needs matplotlib (the lab extra)")


@pytest.mark.parametrize("what", ["reducer", "segments", "attention", "serve", "gap"])
def test_help_teaches(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", what, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for said in (f"era-vllm bench {what}", f"bench-{what}.json", "oal", "--rounds", "--out"):
        assert said in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["reducer", "--sizes", "64:576"], "needed K < N"),
        (["reducer", "--sizes", "576"], "SxN:K or N:K"),
        (["reducer", "--rounds", "0"], "an integer >= 1"),
        (["reducer", "--n-sweep", "64"], "different integers in [65, inf)"),
        (["segments", "--tokens", "4097"], "allowed: squares"),
        (["segments", "--segments", "8"], "different integers in [16, inf)"),
        (["segments", "--rate", "1"], "different numbers in [0, 1)"),
        (["segments", "--rate", ".1,.2"], "got '.1,.2', allowed: one number in [0, 1)"),
        (["serve", "--rates", ".5,1.0"], "different numbers in [0, 1)"),
        (["serve", "--rates", ".5,.5"], "different numbers"),
        (["attention", "--shape", "13b"], "invalid choice"),
        (["gap", "--pictures", "0"], "an integer >= 1"),
        (["gap", "--rate", ".1,.2"], "got '.1,.2', allowed: one number in [0, 1)"),
        ([], "WHAT"),
    ],
)
def test_bad_options_are_refused_by_the_parser(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *flags])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["reducer", "--policies", "era,dppp"], "did you mean 'dpp'?"),
        (["gap", "--rate", ".97"], "--rate: got 0.97, allowed: [0, 0.95] (raise --era-max"),
        (["serve", "--rates", ".97"], "raise --era-max-pruning-rate"),
        (["attention", "--text-tokens", "5000"], "allowed: up to 4096"),
        (["serve", "--side", "672"], "its pictures have one size"),
        (["serve", "--family", "qwen3-vl", "--side", "1000"], "times of 32"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if flags[0] != "reducer" and find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    assert main(["bench", *flags, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["bench", "reducer", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_lists_are_parsed() -> None:
    assert sizes("576:64,5x576:32") == [(576, 64, 1), (576, 32, 5)]
    assert numbers(float, 0, 1)("0,.5") == [0.0, 0.5]


def test_engines_get_room_for_the_longest_request() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, AttentionOptions)
    parser.set_defaults(rounds=3, rates=[0.5])

    def options(*words: str) -> AttentionOptions:
        found = resolved(AttentionOptions, parser.parse_args(words), {})
        assert isinstance(found, AttentionOptions)
        return found

    assert options("--text-tokens", "1000").context == 1024
    assert options().context == 768  # 587 and 16 tokens
    large = options("--family", "qwen3-vl", "--side", "2048")
    assert large.asked.tokens == 4096 and large.context == 4352
    assert options("--dtype", "float32").kv_bytes == 2 * options().kv_bytes
    assert options("--kv-mib", "7").kv_bytes == 7 * 2**20
    assert options().eager and not options("--no-eager").eager


def test_goals_of_serve_compare_the_right_way_round() -> None:
    good = {
        "ttft era 0.889 / stock": 0.4,
        "ttft era 0.944 / stock": 0.44,
        "ttft text era / wide": 1.02,
        "decode text era / wide": 1.04,
        "reducer / tower, era 0.889": 0.04,
    }
    goals = {goal.name: goal for goal in judged(good)}
    assert [goal.met for goal in goals.values()] == [True, True, True, False, True]
    assert goals["TTFT at 0.889 against stock"].value == pytest.approx(2.5)
    assert {goal.met for goal in judged({})} == {None}


def test_the_strict_comparison_swaps_only_the_attention() -> None:
    samples = Samples(
        {
            "text era": {"language_model": (11.0,), "attention": (9.0,)},
            "text stock": {"language_model": (8.0,), "attention": (2.0,)},
            "text wide": {"language_model": (99.0,), "attention": (4.0,)},
        }
    )
    assert strict_ratios(samples, "text")["step"] == pytest.approx(11 / (8 - 2 + 4))
    assert strict_ratios(samples, "text", "decode_") == {}


def test_reducer_writes_figures_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--shape", "tiny", "--sizes", "576:64,200000:64", "--n-sweep", "128,256"]
    flags += ["--k-sweep", "8", "--rounds", "1", "--warm-ups", "0", "--policies", "dpp,uniform"]
    assert main(["bench", "reducer", *flags, "--out", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert "200000->64 left out: it needs about 745.1 GiB" in page
    found = json.loads((tmp_path / "bench-reducer.json").read_text())
    assert {"commit", "hardware", "versions", "command", "settings", "goals"} <= set(found)
    assert found["facts"]["images"] == {"576->64": 1}
    assert set(found["facts"]["share_of_tower"]) == {"dpp", "uniform"}
    assert found["facts"]["growth"]["k"] == {"dpp": None, "uniform": None}  # one point: no fit
    assert "exponent" in found["facts"]["growth"]["n"]["dpp"]
    assert set(found["samples"]) == {
        "tower 576->64",
        *(f"{p} {s}" for p in ("dpp", "uniform") for s in ("576->64", "128->64", "256->64")),
        *(f"{p} 2304->8" for p in ("dpp", "uniform")),
    }
    assert (tmp_path / "bench-reducer.png").read_bytes().startswith(b"\x89PNG")
