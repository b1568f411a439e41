"""InternVL as transformers has it: an InternViT tower over tiles, a token for 2 x 2 patches.

A picture is a grid of tiles and, where it is several, a thumbnail; a video is frames with text
between them. Tile or frame = segment. A token's attention is the mean of its four patches'.
"""

from collections.abc import Mapping, Sequence

from jaxtyping import Float32
from torch import Tensor, nn
from transformers import InternVLConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import interns1
from vllm.multimodal.parse import ImageProcessorItems, VideoProcessorItems

from era_vllm.config import encoder_layer
from era_vllm.contracts import ModelAdapter, TappedLayer
from era_vllm.errors import UnsupportedError
from era_vllm.layout import Layout, equal_units
from era_vllm.types import OF_ENCODER
from era_vllm.vllm_plugin.models import pruned_model

Info = interns1.InternS1ProcessingInfo
Items = ImageProcessorItems | VideoProcessorItems


class InternVLProcessingInfo(Info):
    """vLLM's, but transformers crops unless a request says otherwise, whatever the setting says.

    Upstream: interns1.py:197 (0.32.0).
    """

    def get_num_image_tokens(self, *, mm_kwargs: Mapping[str, object], **of: object) -> int:
        """Return a picture's."""
        given = self.ctx.get_merged_mm_kwargs(mm_kwargs)
        asked = {"crop_to_patches": True, **given, **given.get("images_kwargs", {})}
        return super().get_num_image_tokens(mm_kwargs=asked, **of)


class InternVLAdapter(ModelAdapter):
    """Facts about InternVL. An item's shape is its number of tiles, thumbnail too, or frames."""

    provides = OF_ENCODER
    pixels = ("pixel_values", "pixel_values_videos")

    def check(self, hf_config: InternVLConfig) -> None:
        """Refuse what vLLM ignores or does otherwise."""
        even = {"patches a side": (side := self.side(hf_config), side // 2 * 2)}
        for name, (got, allowed) in {**self.settings(hf_config), **even}.items():
            if got != allowed:
                raise UnsupportedError(f"{name}: got {got!r}, allowed: {allowed!r}")

    def settings(self, hf_config: InternVLConfig) -> Mapping[str, tuple[object, object]]:
        """Name -> what a config says, and what vLLM does. Upstream: interns1.py:617 (0.32.0)."""
        image, patch = hf_config.vision_config.image_size, hf_config.vision_config.patch_size
        return {
            "vision_feature_layer": (hf_config.vision_feature_layer, -1),
            "vision_feature_select_strategy": (hf_config.vision_feature_select_strategy, "default"),
            "downsample_ratio": (hf_config.downsample_ratio, 0.5),
            "image_seq_length": (hf_config.image_seq_length, self.side(hf_config) ** 2 // 4),
            "image_size": (list(image), [image[0]] * 2),
            "patch_size": (list(patch), [patch[0]] * 2),
        }

    def side(self, hf_config: InternVLConfig) -> int:
        """Return the patches a side of a tile."""
        return hf_config.vision_config.image_size[0] // hf_config.vision_config.patch_size[0]

    def layout(self, hf_config: InternVLConfig, modality: str, shape: tuple[int, ...]) -> Layout:
        """A segment each tile or frame; a run each frame."""
        half = self.side(hf_config) // 2
        return equal_units((half, half), *shape, shape, work=half**2, runs=modality == "video")

    def item_shape(
        self, info: Info, modality: str, items: Items, index: int, kwargs: Mapping[str, object]
    ) -> tuple[int, ...]:
        """As many as the processor will make."""
        processor = info.get_hf_processor(**kwargs)
        if modality == "image":
            size = items.get_image_size(index)
            tokens = info.get_num_image_tokens(
                image_width=size.width,
                image_height=size.height,
                processor=processor,
                mm_kwargs=kwargs,
            )
            return (tokens // processor.image_seq_length,)
        if getattr(processor.video_processor, "do_sample_frames", False):
            raise VLLMValidationError(
                "do_sample_frames: got true, allowed: false; use --media-io-kwargs",
                parameter="do_sample_frames",
            )
        return (items.get_num_frames(index),)

    def max_shape(
        self, info: Info, modality: str, seq_len: int, mm_counts: Mapping[str, int]
    ) -> tuple[int, ...]:
        """All tiles and the thumbnail, or as many frames as a prompt may hold."""
        if modality == "video":
            return (info.get_num_frames_with_most_features(seq_len, {modality: 1}),)
        return (info.get_max_image_tokens() // info.get_hf_processor().image_seq_length,)

    def mark(self, info: Info, modality: str) -> Sequence[int]:
        """The token that transformers' processor looks for."""
        processor = info.get_hf_processor()
        return [processor.tokenizer.convert_tokens_to_ids(getattr(processor, f"{modality}_token"))]

    def input_rows(self, layout: Layout) -> Mapping[str, int]:
        """Tiles and frames of all items lie behind one another."""
        return dict.fromkeys(self.pixels, layout.units)

    def signals(
        self, hf_config: InternVLConfig, tapped: Float32[Tensor, "u c m"], layouts: Sequence[Layout]
    ) -> list[Float32[Tensor, "c length"]]:
        """The mean over the 2 x 2 patches of each token."""
        half = self.side(hf_config) // 2
        merged = tapped.unflatten(-1, (half, 2, half, 2)).mean((3, 5)).flatten(2)
        parts = merged.split([layout.units for layout in layouts])
        return [part.transpose(0, 1).flatten(1) for part in parts]

    def encoder_layer(self, hf_config: InternVLConfig, layer: int | None) -> int:
        """The last layer, or another below it."""
        return encoder_layer(layer, -1, hf_config.vision_config.num_hidden_layers)

    def tapped_layer(
        self, model: nn.Module, hf_config: InternVLConfig, layer: int | None
    ) -> TappedLayer:
        """That layer, whose attention is given queries and keys behind their norms."""
        built = model.vision_tower.encoder.layer[self.encoder_layer(hf_config, layer) - 1]
        return TappedLayer(built.attention.attn, hf_config.vision_config.num_attention_heads, 1)


EraInternVLForConditionalGeneration = pruned_model(
    interns1.InternS1ForConditionalGeneration,
    InternVLAdapter(),
    info=InternVLProcessingInfo,
    processor=interns1.InternS1MultiModalProcessor,
    dummy_inputs=interns1.InternS1DummyInputsBuilder,
)
