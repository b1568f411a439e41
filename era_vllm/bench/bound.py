"""The bound of pruning: stock vLLM that keeps the first K projector rows and selects nothing.

Prompt and processor are those of an engine that prunes, so the language model is fed K tokens; the
tower and the projector still work on all N. Attention, head size and positions are stock. No real
reducer can be faster; its answers mean nothing.
"""

from typing import Final

from torch import Tensor
from vllm.model_executor.models import llava

from era_vllm.models.llava import LlavaAdapter
from era_vllm.vllm_plugin.families import Family
from era_vllm.vllm_plugin.fields import unpack_items
from era_vllm.vllm_plugin.models import pruned_processors
from era_vllm.vllm_plugin.names import PREFIX
from era_vllm.vllm_plugin.register import register_family

ARCHITECTURE: Final = "EraBenchFirstTokens"
_ADAPTER: Final = LlavaAdapter()


@pruned_processors(
    _ADAPTER,
    info=llava.LlavaProcessingInfo,
    processor=llava.LlavaMultiModalProcessor,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class FirstTokensLlava(llava.LlavaForConditionalGeneration):
    """LLaVA-1.5 that hands the first K tokens of each image on."""

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """Return for each image [K, d]."""
        items = unpack_items(kwargs, _ADAPTER, self.config, "image")
        rows = super().embed_multimodal(**kwargs)
        return [own[: sum(item.plan.kept)] for own, item in zip(rows, items, strict=True)]


def register() -> None:
    """Make the architecture known to vLLM; idempotent."""
    register_family(ARCHITECTURE.removeprefix(PREFIX), Family(f"{__name__}:FirstTokensLlava"))
