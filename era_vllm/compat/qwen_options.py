"""How vLLM's Qwen-VL processors merge and read the options of a request: sizes, sampled pictures.

Upstream (0.32.0): vllm/model_executor/models/qwen2_vl.py:905
``Qwen2VLProcessingInfo._merge_and_resolve_mm_processor_kwargs`` and :925 ``_get_vision_size``.
Private use: called with a request's options, for an item's size before it is processed.
Remove when: an info says how large an item will be, in rows, columns and frames.
"""

from collections.abc import Mapping
from typing import Any, Final

from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.qwen2_vl import Qwen2VLProcessingInfo
from vllm.model_executor.models.qwen3_vl import Qwen3VLProcessingInfo

_FIXED: Final = ("patch_size", "merge_size", "temporal_patch_size")
"""Options that a tower was built for: another value passes the processor and fails in the tower."""


def item_options(
    info: Qwen2VLProcessingInfo, modality: str, kwargs: Mapping[str, object]
) -> dict[str, Any]:
    """Return what a request and the server say of a modality's items, the request's last.

    Raises:
        VLLMValidationError: one that the tower was built for.
    """
    merged = info._merge_and_resolve_mm_processor_kwargs(kwargs)
    options = dict(merged.get(f"{modality}s_kwargs", {}))
    processor = getattr(info.get_hf_processor(), f"{modality}_processor")
    for name in _FIXED:
        only = getattr(processor, name)
        if options.get(name, only) != only:
            raise VLLMValidationError(
                f"mm_processor_kwargs.{name}: got {options[name]!r}, allowed: {only}, which the "
                "model was built for",
                parameter=f"mm_processor_kwargs.{name}",
            )
    return options


def pixel_bounds(
    info: Qwen2VLProcessingInfo, options: Mapping[str, object], default: Mapping[str, int]
) -> tuple[int, int]:
    """Return the fewest and most pixels of an item.

    Args:
        options: Of ``item_options``.
        default: ``size`` of the Hugging Face processor.

    Raises:
        VLLMValidationError: no whole numbers above 0, or more pixels at least than at most.
    """
    size = info._get_vision_size(options, default_size=default)
    least, most = (size.get(name) for name in ("shortest_edge", "longest_edge"))
    whole = all(isinstance(bound, int) and bound > 0 for bound in (least, most))
    if not whole or least > most:  # type: ignore[operator]  # whole numbers
        raise VLLMValidationError(
            f"mm_processor_kwargs, pixels of an item: got at least {least!r} and at most {most!r}, "
            "allowed: whole numbers above 0, the first not above the second",
            parameter="mm_processor_kwargs",
        )
    return int(least), int(most)


def sampled_pictures(
    info: Qwen3VLProcessingInfo, metadata: Mapping[str, Any], options: Mapping[str, Any], index: int
) -> int | None:
    """Return the pictures that a Qwen3-VL processor takes of a video; None = those it is given.

    Upstream: vllm/model_executor/models/qwen3_vl.py:1083 ``_get_video_second_idx`` (0.32.0).

    Args:
        metadata: As vLLM's loader gives it.
        options: Of ``item_options``; some have a value a video.
        index: Of the video.

    Raises:
        VLLMValidationError: values for fewer videos than there are, or a video without a rate.
    """
    if not options.get("do_sample_frames", metadata.get("do_sample_frames", False)):
        return None
    processor = info.get_video_processor()
    total, count = metadata["total_num_frames"], _own("num_frames", options, index)
    if count is not None:  # which transformers does not bring into bounds
        return count
    if not metadata["fps"]:
        raise VLLMValidationError(
            f"video: got {metadata['fps']!r} pictures a second, needed a number above 0 to sample "
            "it; send do_sample_frames: false",
            parameter="video",
        )
    count = int(total / metadata["fps"] * (_own("fps", options, index) or processor.fps))
    return min(max(count, processor.min_frames), processor.max_frames, total)


def _own(name: str, options: Mapping[str, Any], index: int) -> Any:  # noqa: ANN401  # an option
    """Return an option of a video: a value, or one a video."""
    value = options.get(name)
    if not isinstance(value, list):
        return value
    if index >= len(value):
        raise VLLMValidationError(
            f"mm_processor_kwargs.{name}: got {len(value)} values, needed one for each video",
            parameter=f"mm_processor_kwargs.{name}",
        )
    return value[index]
