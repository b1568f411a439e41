"""``era-vllm calibrate`` of a family whose tower the lab does not ask: an engine prunes."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")

from era_vllm.bench.taken import Taken, cases_of
from era_vllm.calibration import calibrated
from era_vllm.cli.loading import open_language_oracle
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.lab import CHECKPOINT_QWEN3_VL
from era_vllm.lab.asking import messages_of
from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import draw_task
from tests.engine.conftest import CONTROL_FACTOR, TOLERANCE

MODEL = str(CHECKPOINT_QWEN3_VL)
RATES = (0.778, 0.889)


@pytest.mark.parametrize(
    "settings",
    [{"policy": "dpp"}, {"policy": "dpp", "scout": 1, "scout_injection": True}],
    ids=["dpp", "injected"],
)
@pytest.mark.parametrize("kind", ["picture", "several", "film"])
def test_transformers_with_a_case_is_the_engine(engine, setup, kind, settings):
    """Positions on three axes, feature maps, videos, injected states: all travel in a case."""
    from vllm import SamplingParams

    llm = {"max_model_len": 2048, "max_num_batched_tokens": 2048, "max_logprobs": -1}
    live = engine(setup(model=MODEL, llm={**llm, "enable_prefix_caching": False}, **settings))
    task = draw_task(kind, 5, 1, load_material(split="train"))
    cases = list(cases_of(Taken(live.llm), RATES, 2, task))
    assert len(cases) == len(task.questions)
    oracle = open_language_oracle(MODEL)
    greedy = SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
    for at, (case, messages) in enumerate(zip(cases, messages_of(task), strict=True)):
        assert len(case.pruned_ids) < len(case.whole_ids)
        rates = (0.0, RATES[(at + 1) % 2])
        given = (case.whole_ids, case.whole), (case.pruned_ids, case.pruned)
        for rate, (ids, segments) in zip(rates, given, strict=True):
            extra = {"mm_processor_kwargs": {"era": rate}}
            (output,) = live.llm.chat([messages], greedy, use_tqdm=False, **extra)
            row = output.outputs[0].logprobs[0]
            found = torch.tensor([row[token].logprob for token in range(len(row))])
            expected = oracle.log_probs(ids, segments, 1)[0]
            assert (found - expected).abs().max() < TOLERANCE
        without = oracle.log_probs(case.pruned_ids, case.pruned, 1, bias=False)[0]
        assert (found - without).abs().max() > CONTROL_FACTOR * TOLERANCE


def test_the_command_writes_what_a_server_of_it_takes(tmp_path):
    words = ["calibrate", MODEL, "--count", "4", "--out", str(tmp_path)]
    done = subprocess.run(  # its engine ends as vLLM ends one: with what others of a process share
        [sys.executable, "-m", "era_vllm.cli.main", *words],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
    )
    assert "| 7 |" in done.stdout and "next word the same" in done.stdout
    path = tmp_path / "calibration.json"
    values = json.loads(path.read_text())["gamma"]["values"]
    settings = {"policy": "dpp", "calibration": str(path)}
    assert EraConfig.parse(calibrated(MODEL, settings)).gamma == tuple(row[0] for row in values)
    with pytest.raises(ConfigError, match="dpp"):
        calibrated(MODEL, {**settings, "policy": "era"})
