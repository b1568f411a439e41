"""Qwen2-VL and Qwen2.5-VL: a video is one run of frames on a time axis; 2.5 with windows, seconds.

Most blocks of 2.5's tower see windows and hold tokens in their order; the attention that is read is
that of a block that sees whole frames, brought back to raster order.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.video_utils import VideoMetadata
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl
from vllm.multimodal.parse import ImageSize

from era_vllm.compat.qwen_options import item_options, pixel_bounds
from era_vllm.errors import UnsupportedError
from era_vllm.models.qwen_vl import LargestVideos, QwenVLAdapter
from era_vllm.vllm_plugin.models import pruned_model
from era_vllm.vllm_plugin.positions import table_rows


class Qwen2VLAdapter(QwenVLAdapter):
    """Facts about Qwen2-VL."""

    table_factor = 4
    """What vLLM's rotary embedding takes by default with M-RoPE (rotary_embedding/__init__.py:39,
    0.32.0); Qwen3-VL passes 1 (qwen3_vl.py:1818)."""


class Qwen2_5VLAdapter(Qwen2VLAdapter):
    """Facts about Qwen2.5-VL."""

    def check(self, hf_config: Any) -> None:
        """Also refuse a tower without a block that sees whole frames."""
        super().check(hf_config)
        if not hf_config.vision_config.fullatt_block_indexes:
            raise UnsupportedError("fullatt_block_indexes: got [], allowed: one block or more")

    def times(
        self, info: "Qwen2VLInfo", frames: int, metadata: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """In seconds times ``tokens_per_second``, as transformers and vLLM round them."""
        known = VideoMetadata(**{k: v for k, v in metadata.items() if k != "do_sample_frames"})
        patch = info.get_hf_processor().video_processor.temporal_patch_size
        return _times(info.get_hf_config(), frames, patch / known.sampled_fps)

    def made_shapes(
        self, hf_config: Any, modality: str, processed: Mapping[str, Any]
    ) -> list[tuple[int, ...]] | None:
        """Also from the seconds between frames."""
        made = super().made_shapes(hf_config, modality, processed)
        if modality == "image" or made is None:
            return made
        pairs = zip(made, processed["second_per_grid_ts"], strict=True)
        return [(*one[:2], *_times(hf_config, len(one) - 2, float(s))) for one, s in pairs]

    def order(
        self, hf_config: Any, rows: int, columns: int, device: torch.device
    ) -> Int[Tensor, "n"]:
        """By windows."""
        vision = hf_config.vision_config
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        return window_order(rows, columns, side, device)

    def encoder_layer(self, hf_config: Any, layer: int | None) -> int:
        """The last block that sees whole frames, or another that does."""
        whole = [index + 1 for index in hf_config.vision_config.fullatt_block_indexes]
        found = max(whole) if layer is None else super().encoder_layer(hf_config, layer)
        if found not in whole:
            raise UnsupportedError(
                f"attention_layer: got {layer}, a block that sees windows; allowed: "
                f"{', '.join(map(str, whole))}"
            )
        return found


def _times(hf_config: Any, frames: int, seconds: float) -> tuple[int, ...]:
    """Return places on the time axis; seconds between frames are float32 on their way there.

    Upstream: vllm/model_executor/models/qwen2_5_vl.py:1360 (0.32.0).
    """
    step = torch.tensor(seconds, dtype=torch.float32).item()
    step *= hf_config.vision_config.tokens_per_second
    return tuple(int(frame * step) for frame in range(frames))


@lru_cache(maxsize=256)
def window_order(rows: int, columns: int, side: int, device: torch.device) -> Int[Tensor, "n"]:
    """Return where each token of a frame stands among windows of side x side tokens.

    Windows in raster order, tokens within them too; those at the edges may be smaller.
    Upstream: vllm/model_executor/models/qwen2_5_vl.py:773 ``get_window_index_thw`` (0.32.0).
    """
    row, column = torch.arange(rows)[:, None] // side, torch.arange(columns)[None] // side
    window = row * math.ceil(columns / side) + column
    return window.flatten().argsort(stable=True).argsort().to(device)


class Qwen2VLInfo(qwen2_vl.Qwen2VLProcessingInfo):
    """vLLM's, with the video that memory is profiled with as large as videos may be.

    vLLM's has 14 pictures of a picture's largest size (qwen2_vl.py:120, 0.32.0).
    """

    def get_num_frames_with_most_features(self, *_: object, **__: object) -> int:
        """As many as a server samples, and have room in the positions."""
        given = self.ctx.get_mm_config().media_io_kwargs.get("video", {})
        config = self.get_hf_config()
        size, unit = self.largest_frame(), self.adapter.unit(config)
        patch = config.vision_config.temporal_patch_size
        tokens = size.height // unit * (size.width // unit)
        room = table_rows(config.get_text_config()) // tokens * patch
        asked = given.get("num_frames", 32)
        return max(patch, min(asked, room) if asked > 0 else room)

    def largest_frame(self) -> ImageSize:
        """Return the size of the largest picture of a video."""
        options = item_options(self, "video", {})
        default = dict(self.get_hf_processor().video_processor.size)
        _, most = pixel_bounds(self, options, default)
        return self.get_image_size_with_most_features(max_pixels=most)

    def largest_video(self) -> tuple[int, int, int]:
        """Return height, width and pictures of the largest video."""
        size = self.largest_frame()
        return size.height, size.width, self.get_num_frames_with_most_features()


class Qwen2_5VLInfo(Qwen2VLInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    """Of Qwen2.5-VL."""


class _Dummies(LargestVideos, qwen2_vl.Qwen2VLDummyInputsBuilder):
    """Of Qwen2-VL."""


class _Dummies2_5(LargestVideos, qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder):
    """Of Qwen2.5-VL."""


EraQwen2VLForConditionalGeneration = pruned_model(
    qwen2_vl.Qwen2VLForConditionalGeneration,
    Qwen2VLAdapter(),
    info=Qwen2VLInfo,
    processor=qwen2_vl.Qwen2VLMultiModalProcessor,
    dummy_inputs=_Dummies,
)
EraQwen2_5_VLForConditionalGeneration = pruned_model(
    qwen2_5_vl.Qwen2_5_VLForConditionalGeneration,
    Qwen2_5VLAdapter(),
    info=Qwen2_5VLInfo,
    processor=qwen2_5_vl.Qwen2_5_VLMultiModalProcessor,
    dummy_inputs=_Dummies2_5,
)
