"""What only the Qwen-VL families have: feature maps, long positions, yarn; and vLLM's own pruning.

That they are exact is ``test_tiled.py``'s.
"""

from dataclasses import replace

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from era_vllm.errors import UnsupportedError
from tests.engine import test_tiled as tiled
from tests.engine.conftest import CONTROL_FACTOR, TOLERANCE
from tests.engine.families import qwen
from tests.engine.families.case import CLIPS, ODD, TEXT, Ask, Item, about, images, reduced

case = pytest.fixture(scope="module")(lambda: qwen.QWEN3)
folder, theirs, start, check = tiled.folder, tiled.theirs, tiled.start, tiled.check


def test_feature_maps_are_merged_with_their_tokens(case, start, theirs):
    """Dropped, or an anchor's own, the answer is another."""
    live, asks = (
        start(),
        [images(case, TEXT, (ODD, 0.889)), about(case, TEXT, ("video", CLIPS[0], 0.7))],
    )
    for ask, answer in zip(asks, live.ask(asks), strict=True):
        (item,) = ask.items
        whole, (runs, _) = (
            theirs.item(item.kind, item.data),
            reduced(live.config, live.chosen, theirs, item),
        )
        ids = [*answer.prompt_ids, *answer.token_ids][:-1]

        def difference(segments, ids=ids, answer=answer):
            expected = theirs.log_probs(ids, segments, len(answer.log_probs))
            return float((expected - answer.log_probs).abs().max())

        width, starts = whole.width, torch.tensor([0, *whole.runs]).cumsum(0)
        dropped = [replace(run, embeds=run.embeds[:, :width]) for run in runs]
        own = [
            replace(
                run,
                embeds=torch.cat(
                    [run.embeds[:, :width], whole.rows[run.anchors + first, width:]], 1
                ),
            )
            for run, first in zip(runs, starts, strict=False)
        ]
        found = [difference(segments) for segments in (runs, dropped, own)]
        print(
            f"{item.kind}: {found[0]:.1e}, without maps {found[1]:.2g}, anchors' own {found[2]:.2g}"
        )
        assert found[0] < TOLERANCE and min(found[1:]) > CONTROL_FACTOR * TOLERANCE


def test_positions_ahead_of_the_tokens(case, start, check):
    """Thirty pictures of a hundred rows: answered, though a position is far past the tokens."""
    live = start(llm={"max_model_len": 4096, "max_num_batched_tokens": 4096})
    width, height, _ = case.far
    tall = tiled.picture(width, height, 3)
    ask = images(case, TEXT, *[(tall, 0.94)] * 30)
    check(live, [ask], live.ask([ask]))


def test_offsets_are_used_up_by_a_step(case, start):
    live = start()
    live.ask([images(case, TEXT, (ODD, 0.5))])
    offsets = live.model.step_state.anchor_offsets
    offsets.offsets[:, :4] = 7
    carried = torch.arange(4).expand(3, -1)
    assert (offsets.add_to(carried) == carried + 7).all()
    assert (offsets.add_to(carried) == carried).all()


def test_yarn_has_no_room_for_extrapolation(engine, setup, tmp_path):
    (yarn,) = qwen.QWEN3.others
    yarn.save(tmp_path)
    with pytest.raises(UnsupportedError, match="table of 4096 positions .* needed 7168; allowed"):
        engine(setup(llm=tiled.LLM, model=str(tmp_path), allow_extrapolation=True))


class With:
    """A request with options of the processor."""

    def __init__(self, ask, **options):
        self._ask, self._options = ask, options

    def prompt(self):
        prompt = self._ask.prompt()
        prompt["mm_processor_kwargs"] = prompt.get("mm_processor_kwargs", {}) | self._options
        return prompt


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"patch_size": 8}, "mm_processor_kwargs.patch_size: got 8, allowed: 16"),
        ({"merge_size": 1}, "mm_processor_kwargs.merge_size: got 1, allowed: 2"),
        ({"temporal_patch_size": 1}, "temporal_patch_size: got 1, allowed: 2"),
        ({"max_pixels": 0}, "got at least 4096 and at most 0, allowed: whole numbers above 0"),
        ({"max_pixels": -5}, "allowed: whole numbers above 0"),
    ],
    ids=str,
)
def test_options_that_a_tower_was_not_built_for(case, start, options, said):
    """And the next request is answered."""
    live, ask = start(), images(case, TEXT, (ODD, 0.5))
    with pytest.raises(VLLMValidationError, match=said):
        live.ask([With(ask, **options)])
    (answer,) = live.ask([ask])
    assert answer.token_ids


def test_videos_that_stock_takes(case, start):
    """Sampled to an odd number, channels first, as they are: the tokens of each are stock's."""
    live, stock = start(), start(stock=True)
    video, about_it = case.film(CLIPS[1])
    every = {"total_num_frames": len(video), "frames_indices": list(range(len(video)))}
    whole = about_it | every | {"do_sample_frames": True}
    for data, options in (
        ((video, whole), {"num_frames": 5}),
        ((video, whole), {"num_frames": 3}),
        ((video.transpose(0, 3, 1, 2).copy(), about_it), {}),
        ((video[:, :64, :96].copy(), about_it), {"do_resize": False}),
    ):
        ask = Ask(case.marks, TEXT, (Item("video", data, 0.0),))
        (ours,) = live.ask([With(ask, **options)])
        (expected,) = stock.ask([With(tiled._Bare(ask), **options)])
        assert ours.prompt_ids == expected.prompt_ids and ours.token_ids == expected.token_ids
