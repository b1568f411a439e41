"""Tiles are foreseen from a picture's size alone: as many as the processors make."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from vllm.exceptions import VLLMValidationError

from era_vllm.contracts import ModelAdapter
from tests.engine.families import internvl, internvl_hf
from tests.engine.families.case import CLIPS

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def _sizes(count: int) -> list[tuple[int, int]]:
    """(width, height), log-uniform, and what is as far from square as can be."""
    rng = random.Random(0)
    drawn = [tuple(round(math.exp(rng.uniform(0, 7.5))) for _ in "wh") for _ in range(count)]
    return [(1, 1), (4000, 10), (10, 4000), *drawn]


Known = tuple[ModelAdapter, Any, Callable[[Image.Image], int], dict[str, Any]]
"""Adapter, vLLM's sizes, tiles that are made of a picture, and a request's arguments."""


def _internvl_hf(folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Known:
    from transformers import InternVLConfig, InternVLProcessor
    from vllm.model_executor.models import interns1

    from era_vllm.models.internvl_hf import InternVLAdapter, InternVLProcessingInfo

    internvl_hf.CASE.save(folder)
    processor = InternVLProcessor.from_pretrained(folder)
    video = processor.video_processor
    monkeypatch.setattr(interns1, "cached_video_processor_from_config", lambda *_, **__: video)
    config = InternVLConfig.from_pretrained(folder)
    context = SimpleNamespace(
        model_config=None,
        get_hf_config=lambda: config,
        get_hf_processor=lambda *_, **__: processor,
        get_merged_mm_kwargs=dict,
    )

    def made(picture: Image.Image) -> int:
        out = processor(images=picture, text=processor.image_token, return_tensors="pt", **settings)
        return len(out["pixel_values"])

    return InternVLAdapter(), InternVLProcessingInfo(context), made, settings


def _internvl(folder: Path, settings: dict[str, Any], _: pytest.MonkeyPatch) -> Known:
    from transformers import AutoTokenizer
    from vllm.transformers_utils.config import get_config

    from era_vllm.models.internvl import InternVLChatAdapter, InternVLChatProcessingInfo

    internvl.CASE.save(folder)
    config, tokenizer = get_config(folder, False), AutoTokenizer.from_pretrained(folder)
    config.update(settings)  # a request's own are refused by vLLM's processor of videos
    context = SimpleNamespace(
        get_hf_config=lambda: config,
        get_tokenizer=lambda: tokenizer,
        get_merged_mm_kwargs=dict,
    )
    info = InternVLChatProcessingInfo(context)

    def made(picture: Image.Image) -> int:
        return int(info.get_hf_processor().image_processor(picture)["image_num_patches"][0])

    return InternVLChatAdapter(), info, made, {}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (_internvl_hf, {}),
        (_internvl_hf, {"max_patches": 3}),
        (_internvl_hf, {"crop_to_patches": False}),
        (_internvl_hf, {"images_kwargs": {"max_patches": 2}}),
        (_internvl, {}),
        (_internvl, {"max_dynamic_patch": 3, "use_thumbnail": False}),
    ],
)
def test_internvl_tiles_are_as_many_as_are_made(
    family: Callable[..., Known],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.multimodal.parse import ImageProcessorItems

    adapter, info, made, kwargs = family(tmp_path, settings, monkeypatch)
    pictures = [Image.new("RGB", size) for size in _sizes(20 if settings else 60)]
    items = ImageProcessorItems(pictures)
    found = {}
    for index, picture in enumerate(pictures):
        (found[picture.size],) = adapter.item_shape(info, "image", items, index, kwargs)
        assert found[picture.size] == made(picture), picture.size
    if not settings:
        assert set(found.values()) >= {1, 5, 7} and max(found.values()) == 7
        assert adapter.max_shape(info, "image", 4096, {}) == (7,)
    assert adapter.max_shape(info, "video", 1000, {"image": 9}) == (1000 // 36,)


@pytest.mark.parametrize(("family", "case"), [(_internvl_hf, internvl_hf), (_internvl, internvl)])
def test_internvl_marks_are_the_tokens_of_the_prompt(
    family: Callable[..., Known], case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, info, *_ = family(tmp_path, {}, monkeypatch)
    tokenizer = info.get_hf_processor().tokenizer
    for modality, text in case.CASE.marks.items():
        mark = list(adapter.mark(info, modality))
        ids = tokenizer.encode(f"USER: {text} what is shown? ASSISTANT:")
        assert [ids[at : at + len(mark)] for at in range(len(ids))].count(mark) == 1
        assert len(mark) == (1 if text in case.TOKENS else 3)


def test_internvl_frames_are_chosen_before_transformers_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.multimodal.parse import VideoProcessorItems

    adapter, info, *_ = _internvl_hf(tmp_path, {}, monkeypatch)
    items = VideoProcessorItems([CLIPS[1]])
    assert adapter.item_shape(info, "video", items, 0, {}) == (len(CLIPS[1]),)
    info.get_hf_processor().video_processor.do_sample_frames = True
    with pytest.raises(VLLMValidationError, match="do_sample_frames: got true, allowed: false"):
        adapter.item_shape(info, "video", items, 0, {})
