"""Qwen3-VL: feature maps for the first layers (DeepStack), a run and a timestamp for each frame.

A token's row is its embedding and, behind it, one map a level, which vLLM adds to the hidden states
after that layer. They ride: merged with their token, never compared.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
from vllm.model_executor.models import qwen3_vl, qwen3_vl_moe

from era_vllm.compat.qwen_options import item_options, pixel_bounds, sampled_pictures
from era_vllm.models.qwen_vl import LargestVideos, QwenVLAdapter
from era_vllm.vllm_plugin.models import pruned_model

Info = qwen3_vl.Qwen3VLProcessingInfo


class Qwen3VLAdapter(QwenVLAdapter):
    """Facts about Qwen3-VL, dense and with experts."""

    text_between = True

    def width(self, hf_config: Any) -> int | None:
        """The embedding; the maps are riders."""
        return hf_config.vision_config.out_hidden_size

    def sampled(
        self,
        info: Info,
        pictures: Sequence[object],
        metadata: Mapping[str, Any],
        options: Mapping[str, Any],
        index: int,
    ) -> int:
        """Those that the processor samples, where it does."""
        found = sampled_pictures(info, metadata, options, index)
        return len(pictures) if found is None else found

    def resize(self, modality: str, pictures: int) -> Any:
        """All frames of a video share its pixels."""
        if modality == "image":
            return super().resize(modality, pictures)
        return partial(smart_resize, num_frames=max(2, pictures))

    def most_pixels(self, processor: Any, least: int, most: int, unit: int, pictures: int) -> int:
        """Return the bound of a video where ``cap_pixels_per_frame`` is on.

        Upstream: transformers/models/qwen3_vl/video_processing_qwen3_vl.py ``resize`` (5.19).
        """
        frame = min(processor.max_video_tokens * unit * unit, most // pictures)
        return max(frame, int(least * 1.05)) * pictures


class Qwen3VLInfo(qwen3_vl.Qwen3VLProcessingInfo):
    """vLLM's, with the video that memory is profiled with as large as videos may be."""

    def largest_video(self) -> tuple[int, int, int]:
        """Return height, width and pictures of the video with the most tokens.

        All its frames share a number of pixels, which transformers counts with an odd number of
        pictures rounded to the nearest multiple of four, and then fills up: five pictures are
        bounded as four and become three frames. Where pictures are capped it takes many.
        """
        processor, options = self.get_video_processor(), item_options(self, "video", {})
        _, most = pixel_bounds(self, options, dict(processor.size))
        if not options.get("cap_pixels_per_frame", processor.cap_pixels_per_frame):
            size = self.get_image_size_with_most_features(max_pixels=most // 4)
            return size.height, size.width, 5
        cap = processor.max_video_tokens * self.adapter.unit(self.get_hf_config()) ** 2
        pictures = min(processor.max_frames, max(2, -(-most // cap)))
        size = self.get_image_size_with_most_features(max_pixels=most // pictures)
        return size.height, size.width, pictures


class _Dummies(LargestVideos, qwen3_vl.Qwen3VLDummyInputsBuilder):
    """Of Qwen3-VL."""


class Qwen3VLMoeInfo(Qwen3VLInfo, qwen3_vl_moe.Qwen3VLMoeProcessingInfo):
    """The same, with experts."""


def _registered(model: type, info: type) -> Any:
    return pruned_model(
        model,
        Qwen3VLAdapter(),
        info=info,
        processor=qwen3_vl.Qwen3VLMultiModalProcessor,
        dummy_inputs=_Dummies,
    )


EraQwen3VLForConditionalGeneration = _registered(
    qwen3_vl.Qwen3VLForConditionalGeneration, Qwen3VLInfo
)
EraQwen3VLMoeForConditionalGeneration = _registered(
    qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeInfo
)
