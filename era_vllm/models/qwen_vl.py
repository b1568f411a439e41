"""What the Qwen-VL families share: pictures of any size, M-RoPE, a token for 2 x 2 patches.

All items of a pass stand in one sequence in the tower, each frame attending to itself. A frame is
two pictures of a video (a temporal patch), or a picture; frame = segment. An item's shape is rows
and columns of its tokens, then each frame's place on the time axis.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Protocol, cast

import torch
from jaxtyping import Float32, Int
from torch import Tensor, nn
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.qwen2_vl import Qwen2VLProcessingInfo as Info
from vllm.multimodal.parse import ImageProcessorItems, VideoProcessorItems

from era_vllm.compat.qwen_options import item_options, pixel_bounds
from era_vllm.config import encoder_layer
from era_vllm.contracts import ModelAdapter, TappedLayer
from era_vllm.errors import UnsupportedError
from era_vllm.layout import Layout, SegmentLayout
from era_vllm.types import OF_ENCODER

Items = ImageProcessorItems | VideoProcessorItems
_WIDEST = 200
"""Largest ratio of a picture's sides (transformers' ``smart_resize``)."""


class QwenVLAdapter(ModelAdapter):
    """Facts about all of them."""

    provides = OF_ENCODER
    text_between: ClassVar[bool] = False
    """Frames of a video have text between them, and so runs of their own."""

    def check(self, hf_config: Any) -> None:
        """Refuse another number of patches a token than 2 x 2."""
        if (merge := hf_config.vision_config.spatial_merge_size) != 2:
            raise UnsupportedError(f"spatial_merge_size: got {merge}, allowed: 2")

    def layout(self, hf_config: Any, modality: str, shape: tuple[int, ...]) -> Layout:
        """A segment a frame; time, row and column are the axes of a position."""
        return frames_layout(shape, runs=modality == "video" and self.text_between)

    def item_shape(
        self, info: Info, modality: str, items: Items, index: int, kwargs: Mapping[str, object]
    ) -> tuple[int, ...]:
        """As large as the processor will make it."""
        options = item_options(info, modality, kwargs)
        if modality == "image":
            size = items.get_image_size(index)
            resized = self.resized(info, modality, size.height, size.width, 1, options)
            return (*resized, 0)
        data = items.get(index)
        pictures, metadata = data if isinstance(data, tuple) else (data, {})
        if not len(pictures):
            raise VLLMValidationError("video: got no picture, needed one", parameter="video")
        height, width = _height_width(pictures)
        count = self.sampled(info, pictures, metadata, options, index)
        patch = info.get_hf_config().vision_config.temporal_patch_size
        times = self.times(info, -(-count // patch), metadata)
        return (*self.resized(info, modality, height, width, count, options), *times)

    def sampled(
        self,
        info: Info,
        pictures: Sequence[object],
        metadata: Mapping[str, Any],
        options: Mapping[str, Any],
        index: int,
    ) -> int:
        """Return how many pictures of a video are taken: those that were given.

        Args:
            pictures: As given.
            metadata: As vLLM's loader gives it, where the family asks for it.
            options: Of the request and the server.
            index: Of the video.

        Raises:
            VLLMValidationError: the processor is asked to sample, whose counts are not followed.
        """
        processor = info.get_hf_processor().video_processor
        if options.get("do_sample_frames", getattr(processor, "do_sample_frames", False)):
            raise VLLMValidationError(
                "do_sample_frames: got true, allowed: false; use --media-io-kwargs",
                parameter="do_sample_frames",
            )
        return len(pictures)

    def times(self, info: Info, frames: int, metadata: Mapping[str, Any]) -> tuple[int, ...]:
        """Return each frame's place on the time axis: its number."""
        return tuple(range(frames))

    def resized(
        self,
        info: Info,
        modality: str,
        height: int,
        width: int,
        pictures: int,
        options: Mapping[str, Any],
    ) -> tuple[int, int]:
        """Return rows and columns of the tokens of a picture, or of each frame of a video.

        Raises:
            VLLMValidationError: longer than 200 times its width, which transformers refuses.
        """
        if max(height, width) > _WIDEST * min(height, width):
            raise VLLMValidationError(
                f"{modality}: got {height} x {width} pixels, allowed: sides that differ at most "
                f"{_WIDEST} times; cut it",
                parameter=modality,
            )
        processor = getattr(info.get_hf_processor(), f"{modality}_processor")
        unit = self.unit(info.get_hf_config())
        if not options.get("do_resize", processor.do_resize):
            return height // unit, width // unit
        least, most = pixel_bounds(info, options, dict(processor.size))
        if modality == "video":
            capped = options.get("cap_pixels_per_frame", processor.cap_pixels_per_frame)
            most = self.most_pixels(processor, least, most, unit, pictures) if capped else most
        resize = self.resize(modality, pictures)
        made = resize(height=height, width=width, factor=unit, min_pixels=least, max_pixels=most)
        return made[0] // unit, made[1] // unit

    def most_pixels(self, processor: Any, least: int, most: int, unit: int, pictures: int) -> int:
        """Return the bound of a frame where ``cap_pixels_per_frame`` is on.

        Upstream: transformers/models/qwen2_vl/video_processing_qwen2_vl.py ``resize`` (5.19).
        """
        total = int(processor.max_video_tokens * unit * unit * 0.9)
        share = total * processor.temporal_patch_size // pictures
        return max(min(most, share), int(least * 1.05))

    def resize(self, modality: str, pictures: int) -> Any:
        """Return transformers' function that says how large an item is made."""
        return smart_resize

    def unit(self, hf_config: Any) -> int:
        """Return the pixels a side of a token."""
        vision = hf_config.vision_config
        return vision.patch_size * vision.spatial_merge_size

    def max_shape(
        self, info: Info, modality: str, seq_len: int, mm_counts: Mapping[str, int]
    ) -> tuple[int, ...]:
        """vLLM's largest picture, and our largest video."""
        if modality == "image":
            size, unit = info.get_image_size_with_most_features(), self.unit(info.get_hf_config())
            return (size.height // unit, size.width // unit, 0)
        height, width, pictures = cast("VideoSizes", info).largest_video()
        options = item_options(info, modality, {})
        patch = info.get_hf_config().vision_config.temporal_patch_size
        rows, columns = self.resized(info, modality, height, width, pictures, options)
        return (rows, columns, *range(-(-pictures // patch)))

    def input_rows(self, layout: Layout) -> Mapping[str, int]:
        """Patches of all items lie behind one another."""
        patches = layout.units * self.patches(layout)
        return {"pixel_values": patches, "pixel_values_videos": patches}

    def units(self, hf_config: Any, pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The first picture of each frame, put together from its patches.

        Upstream: transformers/models/qwen2_vl/video_processing_qwen2_vl.py ``patchify`` (5.19).
        """
        vision, (rows, columns, *times) = hf_config.vision_config, shape
        side = vision.patch_size
        patches = pixels.view(len(times), rows, columns, 2, 2, 3, -1, side, side)[..., 0, :, :]
        return patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(
            len(times), 3, rows * 2 * side, columns * 2 * side
        )

    def patches(self, layout: Layout) -> int:
        """Return the patches of a frame: 2 x 2 a token."""
        return layout.shape[0] * layout.shape[1] * 4

    def made_shapes(
        self, hf_config: Any, modality: str, processed: Mapping[str, Any]
    ) -> list[tuple[int, ...]] | None:
        """From the grids of patches."""
        grids = processed[f"{modality}_grid_thw"].tolist()
        return [(h // 2, w // 2, *range(t)) for t, h, w in grids]

    def signals(
        self,
        hf_config: Any,
        tapped: Sequence[Float32[Tensor, "c m"]],
        layouts: Sequence[Layout],
    ) -> list[Float32[Tensor, "c length"]]:
        """The mean over the 2 x 2 patches of each token, frame by frame in raster order."""
        frames, found = iter(tapped), []
        for layout in layouts:
            own = torch.stack([next(frames) for _ in range(layout.units)], 1)
            of_tokens = own.unflatten(-1, (-1, 4)).mean(-1)
            order = self.order(hf_config, *layout.shape[:2], own.device)
            if order is not None:
                of_tokens = of_tokens[..., order]
            found.append(of_tokens.flatten(1))
        return found

    def order(
        self, hf_config: Any, rows: int, columns: int, device: torch.device
    ) -> Int[Tensor, "n"] | None:
        """Return where each token of a frame stands in the tower, raster order; None = there."""
        return None

    def encoder_layer(self, hf_config: Any, layer: int | None) -> int:
        """The last block, or another."""
        depth = hf_config.vision_config.depth
        return encoder_layer(layer, depth, depth)

    def tapped_layer(self, model: nn.Module, hf_config: Any, layer: int | None) -> TappedLayer:
        """A block, whose attention is given queries and keys behind their rotary embedding."""
        block = model.visual.blocks[self.encoder_layer(hf_config, layer) - 1]
        heads = hf_config.vision_config.num_heads
        return TappedLayer(block.attn.attn, heads, 0, self.patches)


@lru_cache(maxsize=256)
def frames_layout(shape: tuple[int, ...], *, runs: bool) -> Layout:
    """Return the layout of frames of one size.

    Args:
        shape: Rows, columns, and each frame's place on the time axis.
        runs: Text stands between the frames, which says when they are: each is at time 0.
    """
    rows, columns, *times = shape
    frames, n = len(times), rows * columns
    segments = tuple(
        SegmentLayout((rows, columns), torch.arange(frame * n, (frame + 1) * n), frame)
        for frame in range(frames)
    )
    at = torch.zeros(frames, dtype=torch.int64) if runs else torch.tensor(times)
    axes = torch.meshgrid(at, torch.arange(rows), torch.arange(columns), indexing="ij")
    last = max(rows, columns) if runs else max(rows, columns, times[-1] + 1)
    return Layout(
        shape,
        frames * n,
        segments,
        units=frames,
        run_lengths=(n,) * frames if runs else (),
        offsets=torch.stack(axes, -1).flatten(0, 2),
        spans=(last,) * (frames if runs else 1),
    )


class VideoSizes(Protocol):
    """An info that knows the video which memory is profiled with."""

    def largest_video(self) -> tuple[int, int, int]:
        """Return its height and width, and how many pictures it has."""
        ...


class LargestVideos:
    """Over a family's dummy inputs: videos as large as they may be, not as pictures may be."""

    info: VideoSizes

    def _get_dummy_videos(self, *, num_videos: int, **more: Any) -> list[Any]:
        height, width, pictures = self.info.largest_video()
        size = {"height": height, "width": width, "num_frames": pictures}
        return super()._get_dummy_videos(num_videos=num_videos, **{**more, **size})


def _height_width(pictures: Any) -> tuple[int, int]:
    """Return the size of a video's pictures: PIL, or arrays whose axes transformers tells apart."""
    first = pictures[0]
    if not hasattr(first, "shape"):
        return first.height, first.width
    last = infer_channel_dimension_format(first) == ChannelDimension.LAST
    return tuple(map(int, first.shape[:2] if last else first.shape[1:]))
