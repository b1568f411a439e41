"""How vLLM's Qwen-VL processors merge and read the options of a request: sizes, sampled frames.

Upstream (0.32.0): vllm/model_executor/models/qwen2_vl.py:905
``Qwen2VLProcessingInfo._merge_and_resolve_mm_processor_kwargs`` and :925 ``_get_vision_size``;
qwen3_vl.py:1083 ``Qwen3VLProcessingInfo._get_video_second_idx``.
Private use: called with a request's options, for an item's size before it is processed.
Remove when: an info says how large an item will be, in rows, columns and frames.
"""

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.qwen2_vl import Qwen2VLProcessingInfo
from vllm.model_executor.models.qwen3_vl import Qwen3VLProcessingInfo


def item_options(
    info: Qwen2VLProcessingInfo, modality: str, kwargs: Mapping[str, object]
) -> dict[str, Any]:
    """Return what a request and the server say of a modality's items, the request's last."""
    merged = info._merge_and_resolve_mm_processor_kwargs(kwargs)
    return dict(merged.get(f"{modality}s_kwargs", {}))


def pixel_bounds(
    info: Qwen2VLProcessingInfo, options: Mapping[str, object], default: Mapping[str, int]
) -> tuple[int, int]:
    """Return the fewest and most pixels of an item.

    Args:
        options: Of ``item_options``.
        default: ``size`` of the Hugging Face processor.
    """
    size = info._get_vision_size(options, default_size=default)
    return size["shortest_edge"], size["longest_edge"]


def sampled_frames(
    info: Qwen3VLProcessingInfo, metadata: Mapping[str, Any], options: Mapping[str, Any], index: int
) -> int:
    """Return the temporal patches of a Qwen3-VL video: those that timestamps are written for.

    Args:
        metadata: As vLLM's loader gives it.
        options: Of ``item_options``; some have a value a video.
        index: Of the video.
    """
    fps, frames = (_own(options.get(name), index) for name in ("fps", "num_frames"))
    sample = options.get("do_sample_frames", metadata.get("do_sample_frames", False))
    times = info._get_video_second_idx(
        metadata=dict(metadata),
        do_sample_frames=sample,
        sampled_fps=fps,
        sampled_num_frames=frames,
    )
    return len(times)


def _own(value: Any, index: int) -> Any:  # noqa: ANN401  # an option: a value, or one a video
    return value[index] if isinstance(value, list) else value
