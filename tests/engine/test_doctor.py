"""``era-vllm doctor`` with the sample model: a real engine against plain transformers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from era_vllm.cli.doctor.check import CONTROL_FACTOR, TOLERANCE
from tests.engine.families import CASES
from tests.engine.families.case import Case


def doctor(*words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "era_vllm.cli.main", "doctor", "--json", *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    report = json.loads(done.stdout)
    return done, {finding["name"]: finding["value"] for finding in report["findings"]}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_doctor_knows_the_tiled_families(case: Case, tmp_path: Path) -> None:
    """Checked against plain transformers, where it has the family without a checkpoint's code."""
    case.save(tmp_path)
    if case.name == "InternVLChatModel":
        done, values = doctor(str(tmp_path), "--no-check")
        assert done.returncode == 1
        assert "contains custom code" in values["model"]
        assert "--trust-remote-code" in done.stdout
    trusted = ["--trust-remote-code"] if case.name == "InternVLChatModel" else []
    done, values = doctor(str(tmp_path), *trusted)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in case.marks:
        assert "kept at the default rate 0.778" in values[f"{kind} tokens"]
    if case.name == "InternVLChatModel":
        assert "transformers does not have" in values["left out"]
        return
    assert float(values["with bias"].split(":")[0]) <= TOLERANCE
    assert float(values["without bias"].split(":")[0]) >= CONTROL_FACTOR * TOLERANCE


@pytest.mark.vllm
def test_doctor_finds_all_well_and_its_control_fails() -> None:
    done, values = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"]
    assert "144 (12 x 12); 32 kept" in values["image tokens"]
    assert float(values["with bias"].split(":")[0]) <= TOLERANCE
    assert float(values["without bias"].split(":")[0]) >= CONTROL_FACTOR * TOLERANCE
    assert re.search(r"\d+ -> \d+", values["head size"])
