"""The laws of a model adapter, run on every family's, over sizes of every kind.

A family that is new has a row in ``CASES``; the rest is found.
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from era_vllm.config import EraConfig
from era_vllm.contracts import ModelAdapter
from era_vllm.errors import UnsupportedError
from era_vllm.layout import Layout, cut
from era_vllm.plan import plan
from era_vllm.vllm_plugin.families import FAMILIES

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


class Case(NamedTuple):
    """What the laws need to know of a family: a small config, and the shape of an item."""

    hf_config: Callable[[], Any]
    shape: Callable[[str, int, int, int], tuple[int, ...]]
    """(modality, height, width, frames) -> what ``item_shape`` would return."""
    side: Callable[[Any], int] | None = lambda vision: vision.image_size // vision.patch_size
    """Config of the tower -> patches a side of what it is given; None = four a token."""
    refused: Mapping[str, Any] = {}
    """Fields that vLLM does not follow; each is refused."""


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig

    return LlavaConfig(vision_config=CLIPVisionConfig(image_size=336, patch_size=14).to_dict())


def _llava_next() -> Any:
    from transformers import LlavaNextConfig

    return LlavaNextConfig(
        vision_config=_llava().vision_config.to_dict(),
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )


def _internvl() -> Any:
    from transformers import InternVLConfig

    return InternVLConfig()


def _internvl_chat() -> Any:
    from transformers import PretrainedConfig

    vision = PretrainedConfig(image_size=448, patch_size=14, num_hidden_layers=24)
    more = {"downsample_ratio": 0.5, "force_image_size": 448, "select_layer": -1}
    return PretrainedConfig(vision_config=vision, ps_version="v1", **more)


def _tiles(modality: str, height: int, width: int, frames: int) -> tuple[int, ...]:
    if modality == "video":
        return (frames,)
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    tiles = math.prod(get_optimal_tiled_canvas((height, width), (448, 448), 1, 12))
    return (tiles + (tiles > 1),)


def _llava_onevision() -> Any:
    from transformers import LlavaOnevisionConfig, SiglipVisionConfig

    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(image_size=98, patch_size=14).to_dict(),
        image_grid_pinpoints=[[98 * i, 98 * j] for i in range(1, 7) for j in range(1, 7)],
    )


def _qwen(family: str) -> Callable[[], Any]:
    """Return what makes a Qwen-VL family's config, whose towers know no size of their own."""

    def config() -> Any:
        import transformers

        made = getattr(transformers, f"{family}Config")()
        made.get_text_config().rope_parameters |= {"mrope_section": [16, 24, 24]}
        return made

    return config


def _frames(modality: str, height: int, width: int, frames: int) -> tuple[int, ...]:
    times = (0,) if modality == "image" else (frame * 5 // 2 for frame in range(frames))
    rows, columns = (min(max(1, round(side / 28)), 60) for side in (height, width))
    return (rows, columns, *times)


_QWEN: Final = {"shape": _frames, "side": None}


CASES: Final = {
    "Qwen2VLForConditionalGeneration": Case(_qwen("Qwen2VL"), **_QWEN),
    "Qwen2_5_VLForConditionalGeneration": Case(
        _qwen("Qwen2_5_VL"), **_QWEN, refused={"vision_config.fullatt_block_indexes": []}
    ),
    "Qwen3VLForConditionalGeneration": Case(_qwen("Qwen3VL"), **_QWEN),
    "Qwen3VLMoeForConditionalGeneration": Case(_qwen("Qwen3VLMoe"), **_QWEN),
    "LlavaForConditionalGeneration": Case(_llava, lambda *_: ()),
    "LlavaNextForConditionalGeneration": Case(_llava_next, lambda _, *size: size[:2]),
    "InternVLForConditionalGeneration": Case(
        _internvl,
        _tiles,
        lambda vision: vision.image_size[0] // vision.patch_size[0],
        {
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "full",
            "downsample_ratio": 0.25,
            "image_seq_length": 255,
            "vision_config.image_size": (448, 224),
            "vision_config.patch_size": (14, 7),
        },
    ),
    "InternVLChatModel": Case(
        _internvl_chat,
        _tiles,
        refused={
            "downsample_ratio": 1.0,
            "force_image_size": 224,
            "select_layer": 3,
            "vision_config.patch_size": 64,
        },
    ),
    "LlavaOnevisionForConditionalGeneration": Case(
        _llava_onevision, lambda modality, *size: size[:2] if modality == "image" else size[2:]
    ),
}
SIZE: Final = st.floats(0, math.log(4000)).map(lambda x: round(math.exp(x)))
"""Log-uniform."""
SIZES: Final = st.one_of(
    st.tuples(SIZE, SIZE), st.sampled_from([(1, 1), (4000, 10), (10, 4000), (336, 336)])
)
each_family = pytest.mark.parametrize("name", FAMILIES)


def adapter(name: str) -> ModelAdapter:
    """Return a family's."""
    module, _, cls = FAMILIES[name].target.partition(":")
    return getattr(importlib.import_module(module), cls).adapter


@each_family
def test_its_row_says_what_it_is(name: str) -> None:
    own = adapter(name)
    assert isinstance(own, ModelAdapter) and name in CASES
    assert FAMILIES[name].axes in (1, 3) and FAMILIES[name].modalities
    own.check(CASES[name].hf_config())


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [(name, field, value) for name, case in CASES.items() for field, value in case.refused.items()],
)
def test_what_vllm_does_not_follow_is_refused(name: str, field: str, value: object) -> None:
    config = CASES[name].hf_config()
    *path, last = field.split(".")
    setattr(functools.reduce(getattr, path, config), last, value)
    with pytest.raises(UnsupportedError, match=r"got .*, allowed: "):
        adapter(name).check(config)


@each_family
@given(size=SIZES, frames=st.integers(1, 40), rate=st.floats(0, 0.99), data=st.data())
def test_every_place_is_a_segments_a_separator_or_dropped(
    name: str, size: tuple[int, int], frames: int, rate: float, data: st.DataObject
) -> None:
    own, case = adapter(name), CASES[name]
    config = case.hf_config()
    modality = data.draw(st.sampled_from(FAMILIES[name].modalities))
    shape = case.shape(modality, *size, frames)
    layout = own.layout(config, modality, shape)
    assert layout.shape == shape and layout.work >= len(layout.segments) > 0
    taken = torch.cat([*(segment.places for segment in layout.segments), layout.separators])
    assert len(set(taken.tolist())) == len(taken), "none twice"
    assert int(taken.min()) >= 0 and int(taken.max()) < layout.length
    for segment, run in zip(layout.segments, layout.run_of_segment, strict=True):
        assert (segment.places.diff() > 0).all(), "raster order"
        start = sum(layout.run_lengths[:run])
        assert start <= segment.places[0] and segment.places[-1] < start + layout.run_lengths[run]
    assert layout.position_offsets.shape == (layout.length, FAMILIES[name].axes)
    assert int(layout.position_offsets.min()) >= 0 and int(layout.position_offsets.max()) < 2**16
    assert all(span > 0 for span in layout.spans)
    for count, segment in zip(
        plan(layout, rate, EraConfig()).num_anchors, layout.segments, strict=True
    ):
        assert 1 <= count <= segment.n
    assert _same(layout, own.layout(case.hf_config(), modality, shape)), "of the integers alone"


@each_family
def test_a_row_says_whether_text_stands_between_frames(name: str) -> None:
    row, config = FAMILIES[name], CASES[name].hf_config()
    runs = 1
    if "video" in row.modalities:
        shape = CASES[name].shape("video", 300, 400, 5)
        runs = len(adapter(name).layout(config, "video", shape).run_lengths)
    assert row.frame_runs == (runs > 1)


@each_family
@given(size=SIZES, frames=st.integers(1, 9), most=st.integers(16, 400), data=st.data())
def test_signals_do_not_hang_on_how_segments_are_cut(
    name: str, size: tuple[int, int], frames: int, most: int, data: st.DataObject
) -> None:
    own, case = adapter(name), CASES[name]
    config = case.hf_config()
    modality = data.draw(st.sampled_from(FAMILIES[name].modalities))
    layout = own.layout(config, modality, case.shape(modality, *size, frames))
    tapped = _tapped(case, config, [layout])
    (whole,), (parts,) = (
        own.signals(config, tapped, [one]) for one in (layout, cut(layout, most, 3))
    )
    assert torch.equal(whole, parts)


@each_family
@given(sizes=st.lists(SIZES, min_size=1, max_size=4), data=st.data())
def test_signals_stand_where_their_tokens_do(
    name: str, sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    own, case = adapter(name), CASES[name]
    config = case.hf_config()
    modality = data.draw(st.sampled_from(FAMILIES[name].modalities))
    layouts = [own.layout(config, modality, case.shape(modality, *size, 3)) for size in sizes]
    found = own.signals(config, _tapped(case, config, layouts), layouts)
    assert [x.shape for x in found] == [(2, layout.length) for layout in layouts]
    for x, layout in zip(found, layouts, strict=True):
        assert not x[:, layout.separators].any()
        assert all(x[:, segment.places].all() for segment in layout.segments)


def _tapped(
    case: Case, config: Any, layouts: Sequence[Layout]
) -> torch.Tensor | list[torch.Tensor]:
    """Return random numbers of each unit's keys, in the form that the family's tower gives."""
    if case.side is None:
        per_unit = [4 * layout.segments[0].n for layout in layouts for _ in range(layout.units)]
        return [1 + torch.rand(2, patches) for patches in per_unit]
    side = case.side(config.vision_config)
    return 1 + torch.rand(sum(layout.units for layout in layouts), 2, side * side)


def _same(one: Layout, other: Layout) -> bool:
    return (
        (one.length, one.run_lengths, one.spans) == (other.length, other.run_lengths, other.spans)
        and torch.equal(one.separators, other.separators)
        and torch.equal(one.position_offsets, other.position_offsets)
        and len(one.segments) == len(other.segments)
        and all(
            a.grid == b.grid and torch.equal(a.places, b.places)
            for a, b in zip(one.segments, other.segments, strict=True)
        )
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vision_aspect_ratio", "anyres_max_4"),
        ("spatial_pool_stride", 4),
        ("vision_feature_select_strategy", "default"),
        ("vision_feature_layer", [-2, -1]),
    ],
)
def test_llava_onevision_refuses_what_vllm_ignores(field: str, value: object) -> None:
    name = "LlavaOnevisionForConditionalGeneration"
    config = CASES[name].hf_config()
    setattr(config, field, value)
    with pytest.raises(UnsupportedError, match=f"{field}: got .*, allowed: "):
        adapter(name).check(config)


def test_llava_onevision_refuses_another_tower() -> None:
    with pytest.raises(UnsupportedError, match="vision tower: got CLIPVisionConfig, allowed: Sig"):
        adapter("LlavaOnevisionForConditionalGeneration").check(_llava_next())
