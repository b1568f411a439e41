"""LLaVA-OneVision: how large its items may be; exactness is ``test_tiled.py``'s."""

import numpy as np
import pytest
from vllm.exceptions import VLLMValidationError

from tests.engine import test_tiled as tiled
from tests.engine.families import llava_onevision
from tests.engine.families.case import TEXT, Ask, Item, picture

case = pytest.fixture(scope="module")(lambda: llava_onevision.CASE)
folder, theirs, start, check = tiled.folder, tiled.theirs, tiled.start, tiled.check


def clip(frames, width, height, seed):
    """Return frames of rectangles, [frames, height, width, 3]."""
    return np.stack([np.array(picture(width, height, seed + i)) for i in range(frames)])


def asking(*items):
    """Return a request of (kind, data, rate)."""
    return Ask(llava_onevision.CASE.marks, TEXT, tuple(Item(*item) for item in items))


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


def test_as_many_frames_as_a_server_samples(start, check):
    live = start()
    with pytest.raises(VLLMValidationError, match=r"in 33 frames, allowed: 1568; .* sample fewer"):
        live.ask([asking(("video", clip(33, 30, 30, 9), 0.9))])
    ask = asking(("video", clip(32, 30, 30, 9), 0.9))
    check(live, [ask], live.ask([ask]))
