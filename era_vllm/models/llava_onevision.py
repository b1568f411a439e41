"""LLaVA-OneVision: LLaVA-NeXT's tiles behind a SigLIP tower, resized to nine tiles' tokens; videos.

Each frame of a video is a segment, pooled 2 x 2; a newline follows the last.
"""

import math
from collections.abc import Mapping, Sequence

from jaxtyping import Float32
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig as Config
from transformers import SiglipVisionConfig
from vllm.model_executor.models import llava_onevision as stock
from vllm.multimodal.parse import ImageSize

from era_vllm.errors import UnsupportedError
from era_vllm.layout import Layout, equal_units
from era_vllm.models.anyres import most_tokens
from era_vllm.models.llava_next import LlavaNextAdapter
from era_vllm.vllm_plugin.models import pruned_model
from era_vllm.vllm_plugin.positions import table_rows


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """Facts about LLaVA-OneVision. A video's shape is its number of frames."""

    tower = SiglipVisionConfig
    strategy = "full"
    skipped_keys = 0
    max_tiles = 9

    def check(self, hf_config: Config) -> None:
        """Also refuse another bound and another pooling than vLLM's."""
        super().check(hf_config)
        for name, only in (("vision_aspect_ratio", "anyres_max_9"), ("spatial_pool_stride", 2)):
            if (got := getattr(hf_config, name, only)) != only:
                raise UnsupportedError(f"{name}: got {got!r}, allowed: {only!r}, as vLLM does it")

    def item_shape(self, info, modality, items, index, kwargs):  # noqa: ANN001, ANN201
        """A picture's size, or a video's frames."""
        if modality == "image":
            return super().item_shape(info, modality, items, index, kwargs)
        return (items.get_num_frames(index),)

    def max_shape(self, info, modality, *more):  # noqa: ANN001, ANN002, ANN201
        """Computed: vLLM's own 1153 x 944 is not the largest (llava_onevision.py:183, 0.32.0)."""
        if modality == "video":
            return (info.get_num_frames_with_most_features(),)
        return most_tokens(self._tiling(info.get_hf_config()))

    def busiest_shape(self, info, modality, *more):  # noqa: ANN001, ANN002, ANN201
        """The most tiles, of whose tokens the resize leaves fewer."""
        return (super() if modality == "image" else self).max_shape(info, modality, *more)

    def layout(self, hf_config: Config, modality: str, shape: tuple[int, ...]) -> Layout:
        """A picture as LLaVA-NeXT's; a video's frames, whose newline always stays."""
        if modality == "image":
            return super().layout(hf_config, modality, shape)
        side = self._tiling(hf_config).side
        grid = math.ceil(side / 2), math.ceil(side / 2)
        return equal_units(grid, *shape, shape, work=side * side, separators=1)

    def unpadded_rows(self, layout: Layout) -> Mapping[str, int]:
        """Videos are not padded."""
        return super().unpadded_rows(layout) if len(layout.shape) == 2 else {}

    def signals(
        self,
        hf_config: Config,
        tapped: Float32[Tensor, "u c m"],
        layouts: Sequence[Layout],
    ) -> list[Float32[Tensor, "c length"]]:
        """Cut and resize like a picture's features, or pool like a video's."""
        if len(layouts[0].shape) == 2:
            return super().signals(hf_config, tapped, layouts)
        side = self._tiling(hf_config).side
        maps, grid = tapped.unflatten(2, (side, side)), [math.ceil(side / 2)] * 2
        pooled = nn.functional.interpolate(maps, grid, mode="bilinear")
        parts = pooled.flatten(2).split([layout.units for layout in layouts])
        return [nn.functional.pad(part.transpose(0, 1).flatten(1), (0, 1)) for part in parts]


class LlavaOnevisionInfo(stock.LlavaOnevisionProcessingInfo):
    """vLLM's, with the dummies that it profiles memory with as large as items may be."""

    def get_num_frames_with_most_features(self, *_: object) -> int:
        """As many as a server samples (vLLM's 32, or what it is given; -1 = all), and have room."""
        given = self.ctx.get_mm_config().media_io_kwargs.get("video", {})
        room = table_rows(self.get_hf_config().text_config) // self.layout("video", (1,)).length
        asked = given.get("num_frames", 32)
        return max(1, min(asked, room) if asked > 0 else room)

    def get_image_size_with_most_features(self) -> ImageSize:
        """The most tiles: what the tower works most for."""
        height, width = max(self.get_hf_config().image_grid_pinpoints, key=math.prod)
        return ImageSize(width=width, height=height)


EraLlavaOnevisionForConditionalGeneration = pruned_model(
    stock.LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionAdapter(),
    info=LlavaOnevisionInfo,
    processor=stock.LlavaOnevisionMultiModalProcessor,
    dummy_inputs=stock.LlavaOnevisionDummyInputsBuilder,
)
