"""Tiles of LLaVA-NeXT and LLaVA-OneVision: our layouts are what vLLM itself counts and merges.

Over sizes of every kind, by vLLM's own functions, fed with the numbers of tiles as features.
"""

import math
from functools import cache
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

SIZE: Final = st.floats(0, math.log(4000)).map(lambda x: round(math.exp(x)))
"""Log-uniform."""
SIZES: Final = st.one_of(
    st.tuples(SIZE, SIZE), st.sampled_from([(1, 1), (4000, 10), (10, 4000), (1380, 1152)])
)
FAMILIES: Final = ("llava_next", "llava_onevision", "llava_onevision, 7 x 7")
BASE: Final = (-1, -1)
NEWLINE: Final = (-2, -2)


@cache
def family(name: str) -> tuple[Any, Any, Any, Any]:
    """Return a family's adapter, config, vLLM's ``ProcessingInfo`` and vLLM's model class."""
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaOnevisionConfig,
        SiglipVisionConfig,
    )
    from vllm.model_executor.models import llava_next, llava_onevision

    from era_vllm.models.llava_next import EraLlavaNextForConditionalGeneration as Next
    from era_vllm.models.llava_onevision import EraLlavaOnevisionForConditionalGeneration as Vision

    if name == "llava_next":
        vision = CLIPVisionConfig(image_size=336, patch_size=14)
        pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        config = LlavaNextConfig(vision_config=vision.to_dict(), image_grid_pinpoints=pinpoints)
        info, model, ours = llava_next.LlavaNextProcessingInfo, llava_next, Next
        cls = model.LlavaNextForConditionalGeneration
    else:
        tile = 98 if "7 x 7" in name else 384
        vision = SiglipVisionConfig(image_size=tile, patch_size=14)
        pinpoints = [[tile * i, tile * j] for i in range(1, 7) for j in range(1, 7)]
        config = LlavaOnevisionConfig(
            vision_config=vision.to_dict(), image_grid_pinpoints=pinpoints
        )
        info, model, ours = llava_onevision.LlavaOnevisionProcessingInfo, llava_onevision, Vision
        cls = model.LlavaOnevisionForConditionalGeneration
    return ours.adapter, config, info(SimpleNamespace(get_hf_config=lambda *_: config)), cls


each = pytest.mark.parametrize("name", FAMILIES)


@each
@settings(max_examples=150)
@given(size=SIZES)
def test_a_layout_is_as_long_as_vllm_counts(name: str, size: tuple[int, int]) -> None:
    adapter, config, info, _ = family(name)
    height, width = size
    own = info.get_num_image_tokens(image_width=width, image_height=height)
    assert adapter.layout(config, "image", size).length == own


@each
@settings(max_examples=150)
@given(size=SIZES)
def test_the_largest_picture_is_the_largest(name: str, size: tuple[int, int]) -> None:
    adapter, config, info, _ = family(name)
    most = adapter.layout(config, "image", adapter.max_shape(info, "image", 0, {}))
    busiest = adapter.layout(config, "image", _busiest(name))
    own = adapter.layout(config, "image", size)
    assert own.length <= most.length and own.work <= busiest.work


def _busiest(name: str) -> tuple[int, int]:
    """Return the size of vLLM's dummy with our classes."""
    from era_vllm.models.llava_onevision import LlavaOnevisionInfo

    adapter, _, info, _ = family(name)
    if name != "llava_next":
        info = LlavaOnevisionInfo(info.ctx)
    size = info.get_image_size_with_most_features()
    assert adapter.busiest_shape(info, "image", 0, {}) == (size.height, size.width)
    return size.height, size.width


def test_vllms_own_largest_picture_of_onevision_is_not() -> None:
    adapter, config, info, _ = family("llava_onevision")
    size = info.get_image_size_with_most_features()
    most = adapter.layout(config, "image", adapter.max_shape(info, "image", 0, {}))
    assert adapter.layout(config, "image", (size.height, size.width)).length == 8748
    assert (most.shape, most.length, most.units) == ((1380, 1152), 8765, 13)
    assert _busiest("llava_onevision") == (2304, 2304)


@each
@settings(max_examples=150)
@given(size=SIZES)
def test_segments_stand_where_vllm_merges_their_tiles(name: str, size: tuple[int, int]) -> None:
    """Each tile's features are its row and column of tiles, which a resize mixes at the edges."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    adapter, config, _, cls = family(name)
    layout = adapter.layout(config, "image", size)
    vision = config.vision_config
    across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)[1]
    tiles = [BASE, *(divmod(unit, across) for unit in range(layout.units - 1))]
    n = (vision.image_size // vision.patch_size) ** 2
    features = torch.tensor(tiles, dtype=torch.float64)[:, None].repeat(1, n, 1)
    newline = torch.tensor(NEWLINE, dtype=torch.float64)
    model = SimpleNamespace(config=config, image_newline=newline)
    more = {} if name == "llava_next" else {"image_newline": newline}
    rows = cls._merge_image_patch_embeddings(
        model, torch.tensor(size), features, strategy="spatial_unpad", **more
    )
    assert len(rows) == layout.length
    nearest = (rows + 0.5 + 1e-9).floor().long()
    found = [nearest[segment.places].unique(dim=0).tolist() for segment in layout.segments]
    assert all(len(one) == 1 for one in found), "a segment's tokens are one tile's"
    assert [tuple(one[0]) for one in found] == [tile for tile in tiles if [[*tile]] in found]
    assert (nearest[layout.separators] == torch.tensor(NEWLINE)).all()
    assert len(rows) == len(layout.separators) + sum(segment.n for segment in layout.segments)


@pytest.mark.parametrize("name", FAMILIES[1:])
@given(frames=st.integers(1, 64))
def test_a_videos_layout_is_as_long_as_vllm_counts(name: str, frames: int) -> None:
    adapter, config, info, _ = family(name)
    layout = adapter.layout(config, "video", (frames,))
    own = info.get_num_video_tokens(image_width=9, image_height=9, num_frames=frames)
    assert (layout.length, len(layout.segments)) == (own, frames)
