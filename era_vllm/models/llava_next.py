"""LLaVA-NeXT (1.6): LLaVA-1.5's tower over a base view and a grid of tiles (``anyres.py``)."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float32
from torch import Tensor
from transformers import LlavaNextConfig
from vllm.model_executor.models import llava, llava_next

from era_vllm.errors import UnsupportedError
from era_vllm.layout import Layout
from era_vllm.models.anyres import Tiling, arranged, tile_grid, tiled
from era_vllm.models.llava import LlavaAdapter
from era_vllm.vllm_plugin.models import pruned_model
from era_vllm.vllm_plugin.resolve import era_config


class LlavaNextAdapter(LlavaAdapter):
    """Facts about LLaVA-NeXT. A picture's shape is its height and width in pixels."""

    max_tiles: int | None = None

    def check(self, hf_config: LlavaNextConfig) -> None:
        """Also refuse features of several layers side by side (Granite)."""
        super().check(hf_config)
        if not isinstance(layer := hf_config.vision_feature_layer, int):
            raise UnsupportedError(f"vision_feature_layer: got {layer}, allowed: one layer")

    def layout(self, hf_config: LlavaNextConfig, modality: str, shape: tuple[int, ...]) -> Layout:
        """The base view and what remains of each tile; a newline behind each row."""
        return tiled(self._tiling(hf_config), *shape, era_config(hf_config).separators)

    def made_shapes(
        self, hf_config: LlavaNextConfig, modality: str, processed: Mapping[str, Any]
    ) -> list[tuple[int, ...]] | None:
        """A picture's size; axes of an array are read otherwise by vLLM and transformers."""
        if modality != "image":
            return None
        return [(int(height), int(width)) for height, width in processed["image_sizes"]]

    def unpadded_rows(self, layout: Layout) -> Mapping[str, int]:
        """transformers pads the tiles of each picture to its neighbours' (``do_pad``)."""
        return {"pixel_values": layout.units}

    def signals(
        self,
        hf_config: LlavaNextConfig,
        tapped: Float32[Tensor, "u c m"],
        layouts: Sequence[Layout],
    ) -> list[Float32[Tensor, "c length"]]:
        """Cut the padding off, as from the features."""
        tiling = self._tiling(hf_config)
        parts = tapped.split([layout.units for layout in layouts])
        pairs = zip(parts, layouts, strict=True)
        return [arranged(maps, tile_grid(tiling, *layout.shape)) for maps, layout in pairs]

    def _tiling(self, hf_config: LlavaNextConfig) -> Tiling:
        vision = hf_config.vision_config
        pinpoints = tuple((height, width) for height, width in hf_config.image_grid_pinpoints)
        side = vision.image_size // vision.patch_size
        return Tiling(pinpoints, vision.image_size, side, self.max_tiles)


EraLlavaNextForConditionalGeneration = pruned_model(
    llava_next.LlavaNextForConditionalGeneration,
    LlavaNextAdapter(),
    info=llava_next.LlavaNextProcessingInfo,
    processor=llava_next.LlavaNextMultiModalProcessor,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
