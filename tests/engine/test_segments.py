"""Large segments cut into blocks, and frames that are pruned together: exact against the oracles.

The oracles divide what they see by words of their own (``case.divided``).
"""

from typing import Final

import pytest
import torch

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.samples import load_samples
from era_vllm.types import Signal
from era_vllm.vllm_plugin.families import FAMILIES
from tests.engine import test_tiled as tiled
from tests.engine.families import CASES, llava_onevision
from tests.engine.families.case import (
    CLIPS,
    ODD,
    TALL,
    TEXT,
    WIDE,
    Ask,
    FamilyOracle,
    Item,
    Unpruned,
    about,
    compared,
    images,
)

case = pytest.fixture(
    scope="module",
    params=[
        pytest.param(one, marks=[] if one is llava_onevision.CASE else pytest.mark.slow)
        for one in CASES
    ],
    ids=lambda one: one.name,
)(lambda request: request.param)
folder, theirs, start, check = tiled.folder, tiled.theirs, tiled.start, tiled.check
FILMS: Final = [("video", clip) for clip in CLIPS]
MARKS: Final = {"image": "<image>"}


class SampleOracle(Oracle, FamilyOracle):
    """The shipped LLaVA-1.5: 12 x 12 tokens, all in one segment."""

    def item(self, kind, data):
        """A picture's."""
        tokens = self.tokens([data], EraConfig())
        maps = tokens.signals[Signal.ENCODER_ATTENTION][0]
        whole = (tokens.grid, torch.arange(tokens.n))
        none = torch.zeros(0, dtype=torch.int64)
        return Unpruned(self.pixels(data)[0], tokens.embeds[0], maps, [whole], none)


def sizes_of(live):
    """Return the grids of the segments of all items that an engine has pruned."""
    return {one.tokens.grid for item in live.items.values() for one in item.segments}


def test_blocks_of_the_shipped_model(engine, setup, measured):
    live, theirs = engine(setup(max_segment=50)), SampleOracle(str(CHECKPOINT))
    pictures = [sample.image for sample in load_samples()]
    asks = [
        Ask(MARKS, TEXT, (Item("image", pictures[0], 0.778),)),
        Ask(MARKS, "how many shapes?", tuple(Item("image", pictures[i], 0.889) for i in (1, 2))),
        Ask(MARKS, TEXT, (Item("image", pictures[3], 0.0),)),
    ]
    for ask, answer in zip(asks, live.ask(asks), strict=True):
        found = compared(live.config, live.chosen, theirs, ask, tiled.answered(answer))
        print(found)
        assert found.exact < tiled.TOLERANCE
        if ask.items[0].rate:
            measured(live.config, live.kernel, found.exact, found.no_bias, tiled.TOLERANCE)
            assert min(found.no_bias, found.tile_major) > tiled.CONTROL_FACTOR * tiled.TOLERANCE
    assert sizes_of(live) == {(6, 6)}


def test_blocks_and_frames(case, start, check):
    """48 tokens at most: three frames of 16 together, and no tile of 49 or 144 as it is."""
    together = 1 if FAMILIES[case.name].frame_runs else 3
    live = start(max_segment=30 if together == 1 else 48, frames_per_segment=together)
    asks = [
        images(case, TEXT, (WIDE, 0.778)),
        images(case, TEXT, (ODD, 0.5), (TALL, 0.889)),
        images(case, "how many shapes?", (TALL, 0.0)),
    ]
    if "video" in case.marks:
        asks += [
            about(case, TEXT, (*FILMS[1], 0.778)),
            about(case, TEXT, (*FILMS[0], 0.5), ("image", ODD, 0.889)),
        ]
    check(live, asks, live.ask(asks))
    grids = sizes_of(live)
    assert max(rows * columns for rows, columns in grids) <= live.config.max_segment
    if case is llava_onevision.CASE:
        assert {(12, 4), (4, 4), (3, 4), (4, 3)} <= grids


def test_a_prefix_of_joined_frames_is_shared(start, check, case):
    if case is not llava_onevision.CASE:
        pytest.skip("one family whose frames may be joined")
    live, (short, long) = start(max_segment=48, frames_per_segment=3), FILMS
    asks = [
        *(about(case, text, (*short, 0.2), (*long, 0.7)) for text in tiled.TEXTS[:2]),
        about(case, TEXT, (*short, 0.2), ("image", WIDE, 0.6)),
    ]
    check(live, asks, tiled.answers_of_a_shared_prefix(live, asks))


def test_frames_with_text_between_them_are_refused(case, start):
    if not FAMILIES[case.name].frame_runs:
        pytest.skip("a family whose videos are one run")
    with pytest.raises(ValueError, match="frames_per_segment: got 2, .* allowed: 1"):
        start(frames_per_segment=2)
