"""LLaVA-OneVision's videos: frames are segments, one newline at the end stays."""

import numpy as np
import pytest
from vllm.exceptions import VLLMValidationError

from tests.engine import test_tiled as tiled
from tests.engine.families import llava_onevision
from tests.engine.families.case import ODD, TALL, TEXT, Ask, Item, picture

case = pytest.fixture(scope="module")(lambda: llava_onevision.CASE)
folder, theirs, start, check = tiled.folder, tiled.theirs, tiled.start, tiled.check


def clip(frames, width, height, seed):
    """Return frames of rectangles, [frames, height, width, 3]."""
    return np.stack([np.array(picture(width, height, seed + i)) for i in range(frames)])


CLIP, SHORT = clip(5, 120, 90, 50), clip(3, 90, 120, 70)


def asking(*items, text=TEXT):
    """Return a request of (kind, data, rate)."""
    return Ask(llava_onevision.CASE.marks, text, tuple(Item(*item) for item in items))


def test_videos(start, check):
    live = start()
    asks = [
        asking(("video", CLIP, 0.778)),
        asking(("video", CLIP, 0.944)),
        asking(("video", SHORT, 0.5), ("video", CLIP, 0.889)),
        asking(("video", SHORT, 0.0)),
        asking(text="how many shapes?"),
        asking(("video", CLIP[:1], 0.778)),
    ]
    check(live, asks, live.ask(asks))


def test_pictures_beside_videos(start, check):
    live = start()
    asks = [
        asking(("image", TALL, 0.778), ("video", CLIP, 0.944)),
        asking(("video", SHORT, 0.5), ("image", ODD, 0.889)),
        asking(("video", SHORT, 0.9), ("image", ODD, 0.8), ("video", CLIP, 0.7)),
        asking(("image", TALL, 0.0), ("video", CLIP, 0.8)),
    ]
    check(live, asks, live.ask(asks))


def test_prefix_hits(start, check):
    live, answers = start(), []
    asks = [
        asking(("video", CLIP, 0.31), ("image", second, 0.83), text=text)
        for text, second in ((TEXT, TALL), ("how many shapes?", TALL), (TEXT, ODD))
    ]
    encoded = [live.encoded]
    for ask in asks:
        answers += live.ask([ask])
        encoded.append(live.encoded)
    assert [b - a for a, b in zip(encoded, encoded[1:], strict=False)] == [2, 0, 1]
    assert [answer.cached_tokens >= 32 for answer in answers] == [False, True, True]
    check(live, asks, answers)


def test_chunks_that_end_inside_a_frame(start, check):
    live = start(llm={"max_num_batched_tokens": 24, "max_num_seqs": 4})
    asks = [asking(("video", CLIP, 0.5)), asking(("image", TALL, 0.8), ("video", SHORT, 0.4))]
    check(live, asks, live.ask(asks))


def test_the_largest_items_are_those_that_memory_is_profiled_for(start):
    from vllm.multimodal import MULTIMODAL_REGISTRY

    live = start()
    processor = MULTIMODAL_REGISTRY.create_processor(live.core.vllm_config.model_config)
    info, counts = processor.info, {"image": 1, "video": 1}
    most, work = info.get_mm_max_tokens_per_item(3072, counts), info.most_work(3072, counts)
    assert most == {"image": 619, "video": 32 * 16 + 1} and work == {"image": 1813, "video": 1568}
    dummies = processor.get_dummy_mm_inputs(counts)["mm_kwargs"]
    (image,), (video,) = dummies["image"], dummies["video"]
    assert (image["era_work"].data, video["video_era_work"].data) == (1813, 1568)
    assert len(video["pixel_values_videos"].data) == 32


def test_a_video_that_is_longer_is_refused(start, check):
    live = start()
    with pytest.raises(VLLMValidationError, match="got 33 frames, allowed: 32; sample fewer"):
        live.ask([asking(("video", clip(33, 30, 30, 9), 0.9))])
    ask = asking(("video", clip(32, 30, 30, 9), 0.9))
    check(live, [ask], live.ask([ask]))
