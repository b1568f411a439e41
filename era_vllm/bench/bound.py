"""The bound of pruning: stock vLLM that keeps the first K projector rows and selects nothing.

Prompt and processor are those of an engine that prunes, so the language model is fed K tokens; the
tower and the projector still work on all N. Attention, head size and positions are stock (with
M-RoPE, whose places hang on all N, a prompt's are counted). No real reducer can be faster; its
answers mean nothing.
"""

from dataclasses import replace
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from era_vllm.vllm_plugin.families import FAMILIES
from era_vllm.vllm_plugin.fields import modality_of, unpack_items
from era_vllm.vllm_plugin.layouts import Layouts
from era_vllm.vllm_plugin.models import pruned_processors
from era_vllm.vllm_plugin.names import PREFIX
from era_vllm.vllm_plugin.register import register_family
from era_vllm.vllm_plugin.resolve import era_config

_NAME: Final = "FirstTokens"


def register(architecture: str) -> str:
    """Make a family's bound known to vLLM; idempotent.

    Args:
        architecture: Of the family.

    Returns:
        The name that it has.
    """
    name = f"{_NAME}{architecture}"
    known = FAMILIES[architecture]
    register_family(name, replace(known, target=f"{__name__}:{name}"))
    return PREFIX + name


def __getattr__(name: str) -> Any:  # noqa: ANN401  # a class of which no type knows the base
    """Return the class of a bound, for vLLM's registry."""
    if not name.startswith(_NAME):
        raise AttributeError(name)
    family = FAMILIES[name.removeprefix(_NAME)]
    module, _, pruned = family.target.partition(":")
    own = getattr(import_module(module), pruned)
    adapter, (stock, parts) = own.adapter, own.parts

    def embed_multimodal(self: Any, **kwargs: object) -> list[Tensor]:  # noqa: ANN401
        """Return for each item [K, d]."""
        modality = modality_of(kwargs, family.modalities)
        layouts = Layouts(adapter, self.config, era_config(self.config))
        items = unpack_items(kwargs, layouts, modality)
        rows = stock.embed_multimodal(self, **kwargs)
        return [own[: sum(item.plan.kept)] for own, item in zip(rows, items, strict=True)]

    def get_mrope_input_positions(
        self: Any,  # noqa: ANN401
        input_tokens: list[int],
        mm_features: object,
    ) -> tuple[Tensor, int]:
        """Return the places of a prompt, the same on every axis."""
        return torch.arange(len(input_tokens)).expand(3, -1), 0

    members: dict[str, object] = {"embed_multimodal": embed_multimodal, "__module__": __name__}
    if family.axes > 1:
        members["get_mrope_input_positions"] = get_mrope_input_positions
    bound = type(name, (stock,), members)
    globals()[name] = pruned_processors(adapter, **parts)(bound)
    return globals()[name]
