"""What only the Qwen-VL families have: feature maps, long positions, yarn; and vLLM's own pruning.

That they are exact is ``test_tiled.py``'s.
"""

from dataclasses import replace

import pytest
import torch

from era_vllm.errors import UnsupportedError
from tests.engine import test_tiled as tiled
from tests.engine.conftest import CONTROL_FACTOR, TOLERANCE
from tests.engine.families import qwen
from tests.engine.families.case import CLIPS, ODD, TEXT, about, images, reduced

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
