"""The benchmarks that start engines, end to end with a tiny model: figures are there and add up.

Run by ``make bench``, not by ``make test``. Asserts no time: those are for an idle machine.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.bench, pytest.mark.vllm]

SHORT = ("--shape", "tiny", "--rates", ".889", "--rounds", "2", "--decode-tokens", "3")
STAGES = ("tower", "projector", "reducer", "merge", "language_model", "rest")


def _run(what: str, out: Path, *more: str) -> dict:
    command = [sys.executable, "-m", "era_vllm.cli.main", "bench", what, *SHORT, *more]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "goals" in done.stdout
    assert (out / f"bench-{what}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / f"bench-{what}.json").read_text())


def test_serve_tells_where_the_time_goes(tmp_path: Path) -> None:
    found = _run("serve", tmp_path, "--text-tokens", "32")
    facts, samples = found["facts"], found["samples"]
    assert set(samples) == {
        *("stock", "era 0.889", "bound 0.889", "text stock", "text wide", "text era")
    }
    assert facts["prompt_tokens"] == {"stock": 587, "era 0.889": 75, "bound 0.889": 75}
    for cell in ("stock", "era 0.889", "bound 0.889"):
        parts = [samples[cell][stage]["values_s"] for stage in STAGES]
        assert all(len(values) == 2 for values in parts)
        whole = samples[cell]["ttft"]["values_s"]
        assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(whole)
        assert min(min(values) for values in parts) > 0
    engines = facts["engines"]
    assert engines["era"]["head_size"] == engines["wide"]["head_size"] > 128
    assert engines["era"]["kv_blocks"] == engines["wide"]["kv_blocks"]
    assert engines["era"]["kv_blocks"] < engines["stock"]["kv_blocks"]
    assert engines["stock"]["kv_blocks"] == engines["bound"]["kv_blocks"]
    assert {engine["kv_cache_mib"] for engine in engines.values()} == {32}
    assert facts["profile"]
    assert [goal["met"] is None for goal in found["goals"]] == [False, True, False, False, False]


def test_the_scout_stands_apart(tmp_path: Path) -> None:
    short = ("--text-tokens", "32", "--dtype", "float32", "--no-profile", "--rounds", "1")
    found = _run("serve", tmp_path, *short, "--era-preset", "scout")
    samples, engines = found["samples"], found["facts"]["engines"]
    parts = [samples["era 0.889"][stage]["values_s"][0] for stage in (*STAGES, "scout")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(samples["era 0.889"]["ttft"]["median_s"])
    assert "scout" not in samples["stock"]
    assert found["facts"]["ratios"]["scout / tower, era 0.889"] > 0
    assert engines["era"]["injection_mib"] > 0 == engines["stock"]["injection_mib"]


def test_attention_compares_layers_and_steps(tmp_path: Path) -> None:
    found = _run("attention", tmp_path, "--text-tokens", "32")
    kinds = {name: engine["attention_layer"] for name, engine in found["facts"]["engines"].items()}
    assert kinds == {"era": "RectifiedAttention", "stock": "Attention", "wide": "Attention"}
    for case in ("text", "0.889"):
        for engine in kinds:
            cell = found["samples"][f"{case} {engine}"]
            for prefix in ("", "decode_"):
                layers = cell[f"{prefix}attention"]["values_s"]
                step = cell[f"{prefix}language_model"]["values_s"]
                assert all(0 < own < whole for own, whole in zip(layers, step, strict=True))
    assert all(goal["value"] is not None for goal in found["goals"])


def test_gap_counts_the_pictures_of_a_step(tmp_path: Path) -> None:
    short = ("--shape", "tiny", "--pictures", "8", "--step-tokens", "1200", "--rounds", "1")
    short += ("--dtype", "float32")  # a bf16 product may take 270 times as long
    command = [sys.executable, "-m", "era_vllm.cli.main", "bench", "gap", *short]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench-gap.json").read_text())
    assert found["facts"]["pictures_within_the_budget"] == 2
    assert found["facts"]["most_pictures_between_two_tokens"] == {
        "stock": 2,
        "era": 2,
        "era, not bounded": 8,
    }
    for cell in found["samples"].values():
        tower, longest, all_s = (cell[name]["median_s"] for name in ("tower", "longest", "all"))
        assert 0 < tower < longest <= all_s
