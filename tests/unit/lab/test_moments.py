"""DeepStack's maps, and frames pruned together; unpruned answers are the trainer's."""

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")

from era_vllm.lab import CHECKPOINT_QWEN3_VL
from era_vllm.lab.moments import EXPERIMENTS, TaskOracle, Way, measure, reduced
from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import draw_task
from era_vllm.lab.train.qwen3_vl import ARCH

MAPS = EXPERIMENTS["maps"]
FRAMES, GRID, WIDTH, RIDERS = 4, (4, 5), 6, 3


def test_each_choice_changes_maps_alone() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 20, WIDTH + RIDERS)
    merged, own, none, _ = (reduced(rows, GRID, WIDTH, way, 0.75) for way in MAPS.ways)
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
    learner = ARCH()
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
    counts = measure(TaskOracle(), tasks, MAPS)[0.0, MAPS.ways[0]]
    assert int(counts.right.sum()) == right > 0


@pytest.fixture
def rows() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(FRAMES, GRID[0] * GRID[1], WIDTH + RIDERS)


def test_unpruned_frames_are_themselves(rows: torch.Tensor) -> None:
    for joined in (1, 2, 4):
        segments = reduced(rows, GRID, WIDTH, Way("", joined), 0.0)
        for frame, segment in zip(rows, segments, strict=True):
            assert torch.equal(segment.embeds, frame)
            assert segment.anchors.tolist() == list(range(20))
            assert not segment.log_bias.any()


@pytest.mark.parametrize("joined", [1, 2, 4])
def test_as_many_tokens_stay_and_they_stand_for_all(joined: int, rows: torch.Tensor) -> None:
    segments = reduced(rows, GRID, WIDTH, Way("", joined), 0.75)
    assert sum(len(segment.anchors) for segment in segments) == FRAMES * 5
    mass = sum(float(segment.log_bias.exp().sum()) for segment in segments)
    assert mass == pytest.approx(FRAMES * 20, rel=1e-4)
    for segment in segments:
        assert segment.embeds.shape == (len(segment.anchors), WIDTH + RIDERS)
        assert segment.anchors.tolist() == sorted(set(segment.anchors.tolist()))


def test_of_frames_that_repeat_more_places_stay(rows: torch.Tensor) -> None:
    still = rows[:1].expand(FRAMES, -1, -1)
    places = {
        joined: {
            place
            for segment in reduced(still, GRID, WIDTH, Way("", joined), 0.75)
            for place in segment.anchors.tolist()
        }
        for joined in (1, FRAMES)
    }
    assert len(places[1]) == 5
    assert len(places[FRAMES]) >= 15
