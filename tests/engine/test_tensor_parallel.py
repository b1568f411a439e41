"""Two ranks: the tower's heads are sharded, and both must choose the same anchors."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from era_vllm.config import EraConfig
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.samples import load_samples


def test_ranks_agree_and_the_answer_is_exact(tmp_path):
    folder = Path(__file__).parent
    build = "from random_llava import save_random_llava; import pathlib, sys; "
    build += "save_random_llava(pathlib.Path(sys.argv[1]))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    for arguments in (
        ["-c", build, str(tmp_path / "model")],
        ["run_tensor_parallel.py", str(tmp_path / "model"), str(tmp_path / "out.pt")],
    ):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    saved = torch.load(tmp_path / "out.pt")
    first, second = saved["ranks"]
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)
    oracle = Oracle(str(tmp_path / "model"))
    image = load_samples()[0].image
    attention = oracle.tokens([image]).attention
    assert attention.shape == first[0].shape == (1, 4, 144)  # all heads, not a rank's two
    assert torch.allclose(attention, first[0], atol=1e-5)
    segments = oracle.recycle([image], EraConfig(), first[1])
    exact, without = (
        (oracle.log_probs(saved["ids"][:-1], segments, 9, bias=bias) - saved["log_probs"])
        .abs()
        .max()
        .item()
        for bias in (True, False)
    )
    print(f"tensor parallel 2: difference {exact:.1e}, without bias {without:.1e}")
    assert exact < 1e-4
    assert without > 3e-4
