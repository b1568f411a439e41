"""The LLaVA on SmolLM2 in the trainer: what is learnt is what is merged."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")

from safetensors.torch import load_file

from era_vllm.lab import CHECKPOINT_SMOL
from era_vllm.lab import smol as assembling
from era_vllm.lab.synth.assets import SHAPES, WORDS, load_material
from era_vllm.lab.synth.scene import COLORS
from era_vllm.lab.synth.tasks import draw_task
from era_vllm.lab.train import smol as training
from era_vllm.lab.train.batch import Batch
from era_vllm.lab.train.smol import ARCH, Smol
from tests.unit.lab.train.small_decoder import decoder, tokenizer, use


@pytest.fixture
def learner(monkeypatch: pytest.MonkeyPatch) -> Smol:
    use(monkeypatch)
    made: Any = ARCH()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith(".B"):
                weight.normal_(std=0.1)
    return made


@pytest.fixture
def batch() -> Batch:
    task = draw_task("standard", 3, 1, load_material(split="test"))
    return ARCH.asked([task, task], tokenizer(), random.Random(0), extra=0)


def test_what_is_exported_merges_into_what_was_learnt(
    learner: Smol, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner.export(tmp_path)
    written = load_file(tmp_path / assembling.DELTA_FILE)
    learner.read(tmp_path)  # rounded to bfloat16
    merged = decoder()
    assembling.merge(merged.model, written)
    monkeypatch.setattr(training, "decoder", lambda: merged)
    plain = ARCH()
    plain.model.projector = learner.model.projector
    with torch.no_grad():
        ours, wanted = learner.answer(batch, learner.see(batch))
        theirs, _ = plain.answer(batch, plain.see(batch))
    assert len(wanted) > 8
    assert (ours - theirs).abs().max() < 1e-4 < theirs.std()


def test_only_what_is_exported_is_learnt(learner: Smol, batch: Batch) -> None:
    given = {id(weight) for part in learner._given for weight in part.parameters()}
    learnt = {id(weight) for weight in learner.parameters()}
    assert not {id(w) for w in learner._given[0].parameters()} & learnt
    frozen = [weight for part in learner._given for weight in part.parameters()]
    assert all(weight.requires_grad == (id(weight) in learnt) for weight in frozen)
    assert given & learnt  # the changes stand in the decoder too
    learner.losses(batch)["loss"].backward()
    assert all(weight.grad is not None for weight in learner.parameters())


def test_its_names_are_the_shipped_ones(learner: Smol) -> None:
    shipped = load_file(CHECKPOINT_SMOL / assembling.DELTA_FILE)
    ours = learner.model.state_dict()
    first = {name for name in shipped if not name.startswith("layers.") or ".0." in name[:10]}
    assert first <= ours.keys() and ours.keys() <= shipped.keys()


def test_a_token_is_drawn_to_the_words_for_what_it_shows(learner: Smol, batch: Batch) -> None:
    """The loss falls to nothing where the projector says just that."""
    table, words = learner._given[1].get_input_embeddings().weight, tokenizer()
    for row, word in ((1 + 7, "7"), (10 + 3, "3"), (17 + 2, WORDS[2])):  # a digit, a bar, a word
        assert torch.equal(learner._shown[2][row], table[words.token_to_id(word)])
    assert torch.equal(learner._shown[1][1 + 4], table[words.token_to_id(COLORS[4])])
    assert torch.equal(learner._shown[0][1 + 1], table[words.token_to_id(SHAPES[1])])
    shown = sum(t[label] for t, label in zip(learner._shown, batch.labels[:3], strict=True))
    assert learner.tower_loss(batch, [shown])["tower"] < 1e-6  # type: ignore[list-item]
    alone = replace(batch, rows=())
    assert learner.tower_loss(alone, [torch.zeros_like(shown)])["tower"] > 0.5  # type: ignore
    assert learner.tower_loss(alone, [shown])["tower"] < 1e-6  # type: ignore[list-item]
