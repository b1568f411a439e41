"""vLLM's table of layers by name.

Upstream: vllm/model_executor/layers/attention/attention.py:430 (0.32.0) adds each layer to
``compilation_config.static_forward_context`` and refuses a name twice.
Private use: a layer is taken out before its widened successor registers under the same name.
Remove when: vLLM offers a way to replace an attention layer, or a per-key bias of its own.
"""

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from era_vllm.errors import CacheError


def release(vllm_config: VllmConfig, layer: Attention) -> None:
    """Take a layer out of the table.

    Raises:
        CacheError: the table holds something else under the layer's name.
    """
    found = vllm_config.compilation_config.static_forward_context.pop(layer.layer_name, None)
    if found is not layer:
        raise CacheError(
            f"vLLM's layer table holds {type(found).__name__} under {layer.layer_name!r}, expected "
            "the layer itself; is another plugin replacing attention layers?"
        )
