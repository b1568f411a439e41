"""A family's three vLLM classes with pruning mixed in: sizes, processor, model."""

from collections.abc import Callable
from typing import Any

from vllm.multimodal import MULTIMODAL_REGISTRY

from era_vllm.contracts import ModelAdapter
from era_vllm.vllm_plugin.model_mixin import PrunedModelMixin
from era_vllm.vllm_plugin.processor import PrunedInfoMixin, PrunedProcessorMixin


def pruned_model(model: type, adapter: ModelAdapter, **stock: type) -> Any:  # noqa: ANN401
    """Return a family's model class (no type can say that its base is vLLM's).

    Args:
        model: vLLM's own.
        adapter: The family's facts.
        stock: As for ``pruned_processors``.
    """
    names = {"adapter": adapter, "parts": (model, stock), "__module__": type(adapter).__module__}
    own = type(f"Era{model.__name__}", (PrunedModelMixin, model), names)
    return pruned_processors(adapter, **stock)(own)


def pruned_processors(
    adapter: ModelAdapter, *, info: type, processor: type, dummy_inputs: type
) -> Callable[[type], type]:
    """Return what registers a family's processors of pictures for a model class.

    Args:
        adapter: The family's facts.
        info, processor, dummy_inputs: As vLLM registers them for its own model.
    """
    return MULTIMODAL_REGISTRY.register_processor(
        type(f"Era{processor.__name__}", (PrunedProcessorMixin, processor), {}),
        info=type(f"Era{info.__name__}", (PrunedInfoMixin, info), {"adapter": adapter}),
        dummy_inputs=dummy_inputs,
    )
