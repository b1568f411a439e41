"""The small Qwen3-VL: packed rows are what transformers makes of each prompt, and it exports."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")

from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
from transformers.video_utils import VideoMetadata

from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import Kind, Task, draw_task
from era_vllm.lab.train.arch import Learner
from era_vllm.lab.train.qwen3_vl import ARCH

LIMIT = 12 * 2**20
"""Bytes of the weights in the tree."""


@pytest.fixture(scope="module")
def learner() -> Learner:
    """Random weights, far enough from 0 for positions to count, of bfloat16's values."""
    torch.manual_seed(0)
    learner = ARCH()
    with torch.no_grad():
        for parameter in learner.parameters():
            scale = 2.5 if parameter.ndim > 1 else 1.0
            parameter.copy_((parameter * scale).bfloat16())
    return learner


@pytest.fixture(scope="module")
def folder(learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export")
    learner.export(out)
    return out


def inputs(processor, task: Task, question: str, answer: str):
    """Return what transformers makes of one prompt, with the answer behind it."""
    content = [{"type": "video" if item.seconds else "image"} for item in task.items]
    content.append({"type": "text", "text": question})
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    text += f"{answer}<|im_end|>"
    if task.kind != "film":
        images = [item.frames[0] for item in task.items]
        return processor(text=text, images=images, return_tensors="pt")
    (item,) = task.items
    count = len(item.frames)
    known = VideoMetadata(
        total_num_frames=count, fps=0.5 / item.seconds[0], frames_indices=list(range(count))
    )
    return processor(
        text=text,
        videos=[np.stack([np.asarray(frame) for frame in item.frames])],
        video_metadata=[known],
        do_sample_frames=False,
        return_tensors="pt",
    )


@pytest.mark.parametrize("kind", ["picture", "several", "film"])
def test_a_packed_question_is_the_same_as_one_alone(
    kind: Kind, learner: Learner, folder: Path
) -> None:
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    task = draw_task(kind, 3, 1, load_material(split="test"))
    batch = ARCH.asked([task], ARCH.tokenizer(), random.Random(0), extra=0)
    with torch.no_grad():
        scores, _ = learner.answer(batch, learner.see(batch))
        (row,), place = batch.rows, 0
        assert len(row.questions) > 1
        for question, (first, end) in zip(row.questions, row.spans, strict=True):
            alone = inputs(processor, task, question.text, question.answer)
            pixels = alone["pixel_values_videos" if kind == "film" else "pixel_values"]
            assert torch.allclose(pixels, batch.pixels, atol=1e-6)
            told = end - first
            theirs = model(**alone).logits[0, -told - 1 : -1]
            assert (scores[place : place + told] - theirs).abs().max() < 1e-4
            place += told


def test_a_question_sees_no_other_question(learner: Learner) -> None:
    task = draw_task("picture", 3, 1, load_material(split="test"))
    one = Task(task.kind, task.items, task.questions[:1])
    batches = [
        ARCH.asked([each], ARCH.tokenizer(), random.Random(0), extra=0) for each in (task, one)
    ]
    with torch.no_grad():
        (many, _), (alone, _) = (learner.answer(each, learner.see(each)) for each in batches)
    assert (many[: len(alone)] - alone).abs().max() < 1e-4


def test_the_export_is_small_and_whole(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    assert config["text_config"]["num_hidden_layers"] >= 8
    assert config["vision_config"]["deepstack_visual_indexes"]
    assert (folder / "model.safetensors").stat().st_size < LIMIT


def test_losses_are_named_and_learnt_from(learner: Learner) -> None:
    tasks = [draw_task("film", 1, number, load_material(split="train")) for number in range(2)]
    alone = learner.losses(ARCH.batch(tasks))
    assert torch.equal(alone["loss"], alone["tower"]) and "text" not in alone
    both = learner.losses(ARCH.asked(tasks, ARCH.tokenizer(), random.Random(1)))
    assert torch.isclose(both["loss"], both["text"] + 0.3 * both["tower"])
    both["loss"].backward()
    missing = [name for name, p in learner.named_parameters() if p.grad is None]
    assert not missing
