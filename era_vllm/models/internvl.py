"""InternVL as its authors have it (InternVL 1.5 to 3.5): the tower of ``internvl_hf.py``.

Other names, a processor of vLLM's own, and a shuffle that leaves the tokens of the first
checkpoints (``ps_version`` v1) column by column.
"""

from collections.abc import Mapping, Sequence

from jaxtyping import Float32
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.model_executor.models import internvl
from vllm.multimodal.processing.processor import cached_encode
from vllm.transformers_utils.processors.internvl import IMAGENET_MEAN, IMAGENET_STD

from era_vllm.config import encoder_layer
from era_vllm.contracts import TappedLayer
from era_vllm.errors import UnsupportedError
from era_vllm.layout import Layout
from era_vllm.models.internvl_hf import InternVLAdapter
from era_vllm.vllm_plugin.models import pruned_model


class InternVLChatProcessingInfo(internvl.InternVLProcessingInfo):
    """vLLM's, called as transformers' is."""

    def get_num_image_tokens(self, *, mm_kwargs: object = None, **of: object) -> int:
        """Return a picture's tokens; the processor holds a request's settings."""
        return super().get_num_image_tokens(**of)


class InternVLChatAdapter(InternVLAdapter):
    """The other names."""

    pixels = ("pixel_values_flat", "pixel_values_flat_video")

    def check(self, hf_config: PretrainedConfig) -> None:
        """Also refuse a layer that vLLM counts from 0. Upstream: internvl.py:651 (0.32.0)."""
        super().check(hf_config)
        if (layer := hf_config.select_layer) >= 0:
            raise UnsupportedError(f"select_layer: got {layer}, allowed: layers from the last, -1")

    def settings(self, hf_config: PretrainedConfig) -> Mapping[str, tuple[object, object]]:
        """Name -> what a config says, and what vLLM does."""
        own = hf_config.vision_config.image_size
        return {
            "downsample_ratio": (hf_config.downsample_ratio, 0.5),
            "force_image_size": (hf_config.force_image_size or own, own),
        }

    def side(self, hf_config: PretrainedConfig) -> int:
        """Return the patches a side of a tile."""
        return hf_config.vision_config.image_size // hf_config.vision_config.patch_size

    def mark(self, info: internvl.InternVLProcessingInfo, modality: str) -> Sequence[int]:
        """Plain text, in most tokenizers several tokens."""
        text = internvl.InternVLChatModel.get_placeholder_str(modality, 0)
        return cached_encode(info.get_tokenizer(), text, add_special_tokens=False)

    def norm(self, processor: object) -> tuple[Sequence[float], Sequence[float]]:
        """ImageNet's, which vLLM's own processor writes out."""
        return IMAGENET_MEAN, IMAGENET_STD

    def signals(
        self,
        hf_config: PretrainedConfig,
        tapped: Float32[Tensor, "u c m"],
        layouts: Sequence[Layout],
    ) -> list[Float32[Tensor, "c length"]]:
        """Transposed where the tokens are. Upstream: internvl.py:691 (0.32.0)."""
        if hf_config.ps_version == "v1":
            side = self.side(hf_config)
            tapped = tapped.unflatten(-1, (side, side)).transpose(-1, -2).flatten(-2)
        return super().signals(hf_config, tapped, layouts)

    def encoder_layer(self, hf_config: PretrainedConfig, layer: int | None) -> int:
        """The layer that is selected, or another below it."""
        layers = hf_config.vision_config.num_hidden_layers
        return encoder_layer(layer, hf_config.select_layer, layers)

    def tapped_layer(
        self, model: nn.Module, hf_config: PretrainedConfig, layer: int | None
    ) -> TappedLayer:
        """That layer, whose attention is given queries and keys behind their norms."""
        built = model.vision_model.encoder.layers[self.encoder_layer(hf_config, layer) - 1]
        return TappedLayer(built.attn.attn, hf_config.vision_config.num_attention_heads, 1)


EraInternVLChatModel = pruned_model(
    internvl.InternVLChatModel,
    InternVLChatAdapter(),
    info=InternVLChatProcessingInfo,
    processor=internvl.InternVLMultiModalProcessor,
    dummy_inputs=internvl.InternVLDummyInputsBuilder,
)
