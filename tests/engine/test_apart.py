"""Situations that need processes of their own, each exact against the oracle, float32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.samples import load_samples
from era_vllm.pixels import pixel_hash

FOLDER = Path(__file__).parent
TOLERANCE = 1e-4
QUESTIONS = [["what shape is red?", 0], ["is there a red circle?", None], ["how many shapes?", 1]]


def python(*arguments, **variables):
    """Run Python in this folder; fail with what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "TORCH_"))}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **variables}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture
def apart(tmp_path):
    """Run an engine apart and return what it saved."""

    def run(checkpoint, arguments, **variables):
        raw = json.dumps({"questions": QUESTIONS, **arguments})
        python("run_apart.py", str(checkpoint), raw, str(tmp_path / "out.pt"), **variables)
        return torch.load(tmp_path / "out.pt")

    return run


def check(name, oracle, saved):
    """Compare every answer with the oracle, fed the engine's anchors."""
    images = [sample.image for sample in load_samples()]
    anchors = {}
    for _, chosen, _, seeds in saved["ranks"][0]:
        anchors |= dict(zip(seeds, torch.tensor(chosen), strict=True))
    for (text, picture), answer in zip(QUESTIONS, saved["answers"], strict=True):
        segments = []
        if picture is not None:
            image = images[picture]
            kept = anchors[pixel_hash(oracle.pixels(image)[0])]
            segments = oracle.recycle([image], EraConfig(), kept[None])
        errors = [
            (oracle.log_probs(answer["ids"][:-1], segments, 9, bias=bias) - answer["log_probs"])
            .abs()
            .max()
            .item()
            for bias in (True, False)
        ]
        print(f"{name}: difference {errors[0]:.1e}, without bias {errors[1]:.1e}: {text!r}")
        assert errors[0] < TOLERANCE
        if picture is not None:
            assert errors[1] > 3 * TOLERANCE


def test_tensor_parallel_2(apart, tmp_path):
    build = "from random_llava import save_random_llava as save; import pathlib, sys; "
    python("-c", build + "save(pathlib.Path(sys.argv[1]))", str(tmp_path / "model"))
    saved = apart(tmp_path / "model", {"tensor_parallel_size": 2}, TORCH_COMPILE_DISABLE="1")
    first, second = saved["ranks"]
    assert first == second  # attention, anchors and bias of both ranks, bit for bit
    oracle = Oracle(str(tmp_path / "model"))
    found = torch.tensor(first[0][0])
    images = [sample.image for sample in load_samples()[:2]]
    expected = oracle.tokens(images[: found.shape[0]]).attention
    assert found.shape[1:] == (4, 144)  # all heads, not a rank's two
    assert torch.allclose(expected, found, atol=1e-5)
    check("tensor parallel 2", oracle, saved)


def test_torch_compile(apart, oracle):
    check("torch.compile", oracle, apart(CHECKPOINT, {"enforce_eager": False}))


def test_ngram_speculation(apart, oracle):
    method = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    saved = apart(CHECKPOINT, {"speculative_config": method}, TORCH_COMPILE_DISABLE="1")
    print("accepted drafts:", saved["accepted"])
    assert saved["accepted"] > 0
    check("ngram", oracle, saved)
