"""``era-vllm calibrate`` of a family whose tower the lab does not ask: an engine prunes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from vllm import SamplingParams

pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")

from era_vllm.bench.taken import Taken, engine_cases
from era_vllm.calibration import calibrated
from era_vllm.cli.loading import open_language_oracle
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.lab import CHECKPOINT_QWEN3_VL
from era_vllm.lab.asking import messages_of
from era_vllm.lab.media import png
from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import draw_task
from tests.engine.conftest import CONTROL_FACTOR, TOLERANCE
from tests.engine.families import CASES

MODEL = str(CHECKPOINT_QWEN3_VL)
RATES = (0.778, 0.889)
LLM = {
    "max_model_len": 3072,
    "max_num_batched_tokens": 3072,
    "max_logprobs": -1,
    "enable_prefix_caching": False,
}
ASKED = {"policy": "dpp", "question_aware": True, "policy_options": {"relevance_weight": 0.5}}
TEMPLATE = """{%% for message in messages %%}USER: {%% for part in message.content %%}\
{%% if part.type == "image" %%}%s {%% elif part.type == "video" %%}%s \
{%% else %%}{{ part.text }}{%% endif %%}{%% endfor %%} ASSISTANT:{%% endfor %%}"""


def held(live, folder, task):
    """Compare each case with what the engine answers to its question."""
    with Taken(live.llm) as taken:
        cases = list(engine_cases(taken, RATES, 2, task))
    assert len(cases) == len(task.questions) and not live.model.reducer.listeners[1:]
    oracle = open_language_oracle(folder)
    how = {"positions": live.config.positions}
    greedy = SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
    far = []
    for at, (case, messages) in enumerate(zip(cases, messages_of(task), strict=True)):
        assert len(case.pruned_ids) < len(case.whole_ids)
        rates = (0.0, RATES[(at + 1) % 2])
        given = (case.whole_ids, case.whole), (case.pruned_ids, case.pruned)
        for rate, (ids, segments) in zip(rates, given, strict=True):
            extra = {"mm_processor_kwargs": {"era": rate}}
            (output,) = live.llm.chat([messages], greedy, use_tqdm=False, **extra)
            row = output.outputs[0].logprobs[0]
            found = torch.tensor([row[token].logprob for token in range(len(row))])
            expected = oracle.log_probs(ids, segments, 1, **how)[0]
            assert (found - expected).abs().max() < TOLERANCE
        without = oracle.log_probs(case.pruned_ids, case.pruned, 1, bias=False, **how)[0]
        far.append((found - without).abs().max())
    assert min(far) > CONTROL_FACTOR * TOLERANCE
    return cases


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "dpp"},
        {"policy": "dpp", "scout": 1, "scout_injection": True},
        ASKED,
    ],
    ids=["dpp", "injected", "asked"],
)
@pytest.mark.parametrize("kind", ["picture", "several", "film"])
def test_transformers_with_a_case_is_the_engine(engine, setup, kind, settings):
    """Positions on three axes, feature maps, videos, injected states: all travel in a case."""
    live = engine(setup(model=MODEL, llm=LLM, **settings))
    task = draw_task(kind, 5, 1, load_material(split="train"))
    asked = "question_aware" in settings
    cases = held(live, MODEL, task)
    assert len({id(case.whole) for case in cases}) == 1  # encoded once, whatever is asked
    assert len({id(case.pruned) for case in cases}) == (len(cases) if asked else len(RATES))


def of_family(case, folder):
    """Save a family's checkpoint with a chat template."""
    case.save(folder)
    marks = case.marks["image"], case.marks.get("video", "")
    (folder / "chat_template.jinja").write_text(TEMPLATE % marks)
    return str(folder)


@pytest.mark.parametrize(
    "case", [one for one in CASES if one.name != "InternVLChatModel"], ids=lambda one: one.name
)
def test_every_family_that_transformers_has(case, engine, setup, tmp_path):
    folder = of_family(case, tmp_path)
    live = engine(setup(model=folder, llm={**case.llm, **LLM}))
    kinds = ("picture", "film") if "video" in case.marks else ("picture",)
    for kind in kinds:
        task = draw_task(kind, 5, 1, load_material(split="train"))
        held(live, folder, replace(task, questions=task.questions[:2]))


def test_what_cannot_be_a_case_is_refused(engine, setup):
    live = engine(setup(model=MODEL, llm=LLM, policy="dpp"))
    task = draw_task("picture", 5, 1, load_material(split="train"))
    (picture,), text = task.media, {"type": "text", "text": "what is it?"}
    thin = png(Image.new("RGB", (4000, 4)))
    with Taken(live.llm) as taken:
        for parts, message in (
            ([picture.part(), {**text, "text": "what <|video_pad|> is it?"}], "in its text"),
            ([picture.part(), {**text, "text": "what <|image_pad|> is it?"}], "in its text"),
            ([picture.part(), picture.part(), text], "needed different ones"),
            ([thin.part(), text], "sides that differ"),
            ([picture.part(), {**text, "text": "what? " * 4000}], "3072"),
        ):
            taken.forget()
            with pytest.raises(ConfigError, match=message):
                taken.of([{"role": "user", "content": parts}], 0.778)
        taken.forget()
        ids, segments = taken.of([{"role": "user", "content": [picture.part(), text]}], 0.778)
        assert len(segments) == 1 and len(ids) > len(segments[0].anchors)


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
