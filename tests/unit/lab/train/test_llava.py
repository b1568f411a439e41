"""The shipped LLaVA in the trainer: its weights give transformers' answers in packed rows."""

import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")

from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from era_vllm.lab import CHECKPOINT
from era_vllm.lab.asking import prompt_of
from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import draw_task
from era_vllm.lab.train.arch import Learner
from era_vllm.lab.train.llava import ARCH


@pytest.fixture(scope="module")
def learner() -> Learner:
    learner = ARCH()
    learner.read(CHECKPOINT)
    return learner


def test_a_packed_question_is_the_same_as_one_alone(learner: Learner) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    processor = LlavaProcessor.from_pretrained(CHECKPOINT)
    task = draw_task("standard", 3, 1, load_material(split="test"))
    batch = ARCH.asked([task], ARCH.tokenizer(), random.Random(0), extra=0)
    with torch.no_grad():
        scores, _ = learner.answer(batch, learner.see(batch))
        (row,), place = batch.rows, 0
        for question, (first, end) in zip(row.questions, row.spans, strict=True):
            text = f"{prompt_of(question.text)} {question.answer}</s>"
            alone = processor(images=task.items[0].frames[0], text=text, return_tensors="pt")
            assert torch.allclose(alone["pixel_values"], batch.pixels, atol=1e-5)
            alone.pop("token_type_ids", None)
            told = end - first
            theirs = model(**alone).logits[0, -told - 1 : -1]
            assert (scores[place : place + told] - theirs).abs().max() < 1e-3
            place += told


def test_the_export_has_the_shipped_names_and_values(learner: Learner, tmp_path: Path) -> None:
    learner.export(tmp_path)
    ours, shipped = (load_file(folder / "model.safetensors") for folder in (tmp_path, CHECKPOINT))
    assert ours.keys() == shipped.keys()
    assert all(torch.equal(ours[name], shipped[name]) for name in shipped)
