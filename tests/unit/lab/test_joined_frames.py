"""Frames pruned together: what is kept, and in which frame it stays."""

import pytest
import torch

from era_vllm.lab.joined_frames import reduced

FRAMES, GRID, WIDTH, RIDERS = 4, (4, 5), 6, 3


@pytest.fixture
def rows() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(FRAMES, GRID[0] * GRID[1], WIDTH + RIDERS)


def test_unpruned_frames_are_themselves(rows: torch.Tensor) -> None:
    for joined in (1, 2, 4):
        segments = reduced(rows, GRID, WIDTH, joined, 0.0)
        for frame, segment in zip(rows, segments, strict=True):
            assert torch.equal(segment.embeds, frame)
            assert segment.anchors.tolist() == list(range(20))
            assert not segment.log_bias.any()


@pytest.mark.parametrize("joined", [1, 2, 4])
def test_as_many_tokens_stay_and_they_stand_for_all(joined: int, rows: torch.Tensor) -> None:
    segments = reduced(rows, GRID, WIDTH, joined, 0.75)
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
            for segment in reduced(still, GRID, WIDTH, joined, 0.75)
            for place in segment.anchors.tolist()
        }
        for joined in (1, FRAMES)
    }
    assert len(places[1]) == 5
    assert len(places[FRAMES]) >= 15
