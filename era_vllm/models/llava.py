"""LLaVA-1.5: a CLIP tower, a two-layer projector, a decoder-only language model.

Every image is resized to the tower's one size, so N is fixed (576 for CLIP-L/14-336). The
attention is that of the layer the features come from (``vision_feature_layer``), as in ERA Fig. 6.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from era_vllm.config import encoder_layer
from era_vllm.contracts import ModelAdapter, TappedLayer
from era_vllm.errors import UnsupportedError
from era_vllm.types import Signal
from era_vllm.vllm_plugin.model_mixin import PrunedModelMixin
from era_vllm.vllm_plugin.processor import PrunedInfoMixin, PrunedProcessorMixin


class LlavaAdapter(ModelAdapter):
    """Facts about LLaVA-1.5."""

    architectures = ("LlavaForConditionalGeneration",)
    provides = frozenset({Signal.ENCODER_ATTENTION, Signal.ENCODER_SCORES})

    def grid(self, hf_config: LlavaConfig) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        vision = hf_config.vision_config
        if not isinstance(vision, CLIPVisionConfig):
            raise UnsupportedError(
                f"LLaVA vision tower: got {type(vision).__name__}, allowed: CLIPVisionConfig"
            )
        if hf_config.vision_feature_select_strategy != "default":
            raise UnsupportedError(
                "vision_feature_select_strategy: got "
                f"{hf_config.vision_feature_select_strategy!r}, allowed: 'default' (no CLS token)"
            )
        side = vision.image_size // vision.patch_size
        return side, side

    def split(self, inputs: Mapping[str, object], segments: int) -> list[dict[str, object]]:
        """Cut the pictures, [images, 3, h, w]."""
        pixels = inputs.get("pixel_values")
        if not isinstance(pixels, Tensor):
            return []
        return [{**inputs, "pixel_values": part} for part in pixels.split(segments)]

    def language_model(self, model: nn.Module) -> nn.Module:
        """The module whose attention layers carry the bias."""
        return model.language_model

    def encoder_layer(self, hf_config: LlavaConfig, layer: int | None) -> int:
        """The CLIP layer whose output the features are, or another below it."""
        layers = hf_config.vision_config.num_hidden_layers
        return encoder_layer(layer, hf_config.vision_feature_layer, layers)

    def tapped_layer(
        self, model: nn.Module, hf_config: LlavaConfig, layer: int | None
    ) -> TappedLayer:
        """That layer of the built tower."""
        built = model.vision_tower.vision_model.encoder.layers
        index = self.encoder_layer(hf_config, layer)
        heads = hf_config.vision_config.num_attention_heads
        return TappedLayer(built[index - 1].self_attn.attn, heads, 1)


class EraLlavaInfo(PrunedInfoMixin, LlavaProcessingInfo):
    """Sizes of LLaVA-1.5, with the encoder budgeted for N."""


class EraLlavaProcessor(PrunedProcessorMixin, LlavaMultiModalProcessor):
    """LLaVA-1.5's processor with K placeholders an image."""


def _info(ctx: object) -> EraLlavaInfo:
    return EraLlavaInfo(ctx)


def _processor(info: EraLlavaInfo, dummy_inputs: object) -> EraLlavaProcessor:
    return EraLlavaProcessor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    _processor, info=_info, dummy_inputs=LlavaDummyInputsBuilder
)
class EraLlavaForConditionalGeneration(PrunedModelMixin, LlavaForConditionalGeneration):
    """LLaVA-1.5 with pruned visual tokens."""

    adapter: ClassVar[ModelAdapter] = LlavaAdapter()
