"""LLaVA-1.5: CLIP, a two-layer projector, a decoder; pictures of one size, so N is fixed (576).

Attention is that of the layer the features come from (``vision_feature_layer``), as in ERA Fig. 6.
"""

from torch import nn
from transformers import CLIPVisionConfig, LlavaConfig
from vllm.model_executor.models import llava

from era_vllm.config import encoder_layer
from era_vllm.contracts import ModelAdapter, TappedLayer
from era_vllm.errors import UnsupportedError
from era_vllm.layout import Layout, one_grid
from era_vllm.types import OF_ENCODER
from era_vllm.vllm_plugin.models import pruned_model


class LlavaAdapter(ModelAdapter):
    """Facts about LLaVA-1.5."""

    provides = OF_ENCODER
    tower: type = CLIPVisionConfig
    strategy = "default"  # visual are all tokens of the tower but the CLS token
    skipped_keys = 1

    def check(self, hf_config: LlavaConfig) -> None:
        """Refuse other towers, and another choice of tokens."""
        if not isinstance(vision := hf_config.vision_config, self.tower):
            got = type(vision).__name__
            raise UnsupportedError(f"vision tower: got {got}, allowed: {self.tower.__name__}")
        if (strategy := hf_config.vision_feature_select_strategy) != self.strategy:
            said = f"vision_feature_select_strategy: got {strategy!r}, allowed: {self.strategy!r}"
            raise UnsupportedError(said)

    def layout(self, hf_config: LlavaConfig, modality: str, shape: tuple[int, ...]) -> Layout:
        """One segment, whatever the picture's size."""
        side = hf_config.vision_config.image_size // hf_config.vision_config.patch_size
        return one_grid(side, side, ())

    def encoder_layer(self, hf_config: LlavaConfig, layer: int | None) -> int:
        """The CLIP layer whose output the features are, or another below it."""
        layers = hf_config.vision_config.num_hidden_layers
        return encoder_layer(layer, hf_config.vision_feature_layer, layers)

    def tapped_layer(
        self, model: nn.Module, hf_config: LlavaConfig, layer: int | None
    ) -> TappedLayer:
        """That layer of the built tower."""
        built = model.vision_tower.vision_model.encoder.layers
        tapped = built[self.encoder_layer(hf_config, layer) - 1].self_attn.attn
        return TappedLayer(tapped, hf_config.vision_config.num_attention_heads, self.skipped_keys)


EraLlavaForConditionalGeneration = pruned_model(
    llava.LlavaForConditionalGeneration,
    LlavaAdapter(),
    info=llava.LlavaProcessingInfo,
    processor=llava.LlavaMultiModalProcessor,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
