"""The bound of pruning: stock vLLM that keeps the first K projector rows and selects nothing.

Prompt and processor are those of an engine that prunes, so the language model is fed K tokens; the
tower and the projector still work on all N. Attention, head size and positions are stock. No real
reducer can be faster; its answers mean nothing.
"""

from typing import Final

from torch import Tensor
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder, LlavaForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from era_vllm.compat import models_config_map
from era_vllm.models.llava import EraLlavaInfo, EraLlavaProcessor
from era_vllm.vllm_plugin.processor import NUM_ANCHORS, PIXEL_HASH
from era_vllm.vllm_plugin.resolve import resolve

ARCHITECTURE: Final = "EraBenchFirstTokens"
_ORIGINAL: Final = "LlavaForConditionalGeneration"


@MULTIMODAL_REGISTRY.register_processor(
    lambda info, dummy_inputs: EraLlavaProcessor(info, dummy_inputs),
    info=lambda ctx: EraLlavaInfo(ctx),
    dummy_inputs=LlavaDummyInputsBuilder,
)
class FirstTokensLlava(LlavaForConditionalGeneration):
    """LLaVA-1.5 that hands the first K tokens of each image on."""

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """Return for each image [K, d]."""
        counts = kwargs.pop(NUM_ANCHORS)
        kwargs.pop(PIXEL_HASH, None)
        rows = super().embed_multimodal(**kwargs)
        kept = counts.flatten().tolist()
        return [image[:count] for image, count in zip(rows, kept, strict=True)]


def register() -> None:
    """Make the architecture known to vLLM; idempotent."""
    from vllm.model_executor.models.registry import ModelRegistry

    if ARCHITECTURE in ModelRegistry.get_supported_archs():
        return
    models_config_map.add(ARCHITECTURE, _ORIGINAL, resolve)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}:FirstTokensLlava")
