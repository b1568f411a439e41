"""``era-vllm doctor`` with the sample model: a real engine against plain transformers."""

import json
import os
import re
import subprocess
import sys

import pytest

from era_vllm.cli.doctor.check import CONTROL_FACTOR, TOLERANCE


@pytest.mark.vllm
def test_doctor_finds_all_well_and_its_control_fails() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    done = subprocess.run(
        [sys.executable, "-m", "era_vllm.cli.main", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    values = {finding["name"]: finding["value"] for finding in report["findings"]}
    assert report["ok"]
    assert "144 (12 x 12); 32 kept" in values["image tokens"]
    assert float(values["with bias"].split(":")[0]) <= TOLERANCE
    assert float(values["without bias"].split(":")[0]) >= CONTROL_FACTOR * TOLERANCE
    assert re.search(r"\d+ -> \d+", values["head size"])
