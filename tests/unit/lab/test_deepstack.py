"""DeepStack's maps under pruning: which maps an anchor gets; unpruned answers are the trainer's."""

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")

from era_vllm.lab import CHECKPOINT_QWEN3_VL
from era_vllm.lab.deepstack import MAPS, measure, reduced
from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import draw_task
from era_vllm.lab.task_oracle import TaskOracle
from era_vllm.lab.train.qwen3_vl import ARCH

GRID, WIDTH = (4, 5), 6


def test_each_choice_changes_maps_alone() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 20, WIDTH + 3)
    merged, own, none, _ = (reduced(rows, GRID, WIDTH, maps, 0.75) for maps in MAPS)
    for moment in range(2):
        anchors = merged[moment].anchors
        assert len(anchors) == 5
        for other in (own[moment], none[moment]):
            assert torch.equal(other.embeds[:, :WIDTH], merged[moment].embeds[:, :WIDTH])
            assert torch.equal(other.anchors, anchors)
        assert torch.equal(own[moment].embeds[:, WIDTH:], rows[moment, anchors, WIDTH:])
        assert not none[moment].embeds[:, WIDTH:].any()
        assert (merged[moment].embeds - own[moment].embeds)[:, WIDTH:].abs().max() > 0.1


@pytest.mark.parametrize(
    "kind", ["several", *(pytest.param(k, marks=pytest.mark.slow) for k in ("picture", "film"))]
)
def test_unpruned_it_answers_as_the_trainer_counts(kind: str) -> None:
    material = load_material(split="test")
    tasks = [draw_task(kind, 5, number, material) for number in range(4)]  # type: ignore[arg-type]
    tasks = [task for task in tasks if task.questions]
    learner = ARCH.learner()
    learner.read(CHECKPOINT_QWEN3_VL)
    batch = ARCH.asked(tasks, ARCH.tokenizer(), random.Random(0), extra=0)
    with torch.no_grad():
        scores, wanted = learner.answer(batch, learner.see(batch))
    hits, place, right = (scores.argmax(-1) == wanted).tolist(), 0, 0
    for row in batch.rows:
        for first, end in row.spans:
            right += all(hits[place : place + end - first])
            place += end - first
    tasks = [
        replace(task, questions=row.questions)  # a row takes so many
        for task, row in zip(tasks, batch.rows, strict=True)
    ]
    counts = measure(TaskOracle(), tasks)[0.0, "merged"]
    assert int(counts.right.sum()) == right > 0
