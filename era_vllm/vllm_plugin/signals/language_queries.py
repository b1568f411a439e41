"""Queries of the language model's first layer, of each visual token alone.

Its own modules are called on the encoder's rows: input norm, query projection and query norm.
``Attention`` is not, so no forward context is needed and a compiled model is left as it is. Before
its rotary embedding, which turns all heads of a token alike. Under tensor parallelism each rank
holds some heads; they are gathered, so that every rank chooses the same anchors. Leaves out later
layers, whose queries depend on what stands before a token.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)

from era_vllm.errors import UnsupportedError
from era_vllm.types import Signal
from era_vllm.vllm_plugin.fields import Planned

_READ: Final = frozenset(
    {
        *("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"),
        "Qwen3MoeAttention",
    }
)
"""vLLM's attention modules whose queries are made as here: ``qkv_proj``, then ``q_norm`` if any."""


class LanguageQueries:
    """Gives them for the rows of a pass."""

    gives: Final = frozenset({Signal.LANGUAGE_QUERIES})

    def __init__(self, language_model: nn.Module, width: int | None) -> None:
        """Find the layer.

        Args:
            width: Columns of a row that are the token; None = all.

        Raises:
            UnsupportedError: a first layer that is another rank's, or makes queries otherwise.
        """
        layers = getattr(getattr(language_model, "model", None), "layers", None)
        layer = layers[0] if layers else None
        attention = getattr(layer, "self_attn", None)
        if type(attention).__name__ not in _READ or getattr(attention, "do_llama_4_scaling", False):
            found = type(layer if attention is None else attention).__name__
            raise UnsupportedError(
                f"queries of the first layer of {type(language_model).__name__}: got {found}, "
                f"allowed: {', '.join(sorted(_READ))}, held by every rank; choose another policy "
                "with --era-policy, such as dpp"
            )
        self._norm, self._attention, self._width = layer.input_layernorm, attention, width

    def before(self, items: Sequence[Planned]) -> None:
        """Nothing to get ready."""

    def after(
        self, items: Sequence[Planned], rows: Sequence[Tensor]
    ) -> Mapping[Signal, Sequence[Tensor]]:
        """Return float32 [hq, dh, length] of each item."""
        queries = self._queries(torch.cat([own[:, : self._width] for own in rows]))
        of_items = queries.split([len(own) for own in rows])
        return {Signal.LANGUAGE_QUERIES: [one.permute(1, 2, 0) for one in of_items]}

    def _queries(self, states: Float[Tensor, "m d"]) -> Float[Tensor, "m hq dh"]:
        attention = self._attention
        joined, _ = attention.qkv_proj(self._norm(states))
        query = joined[:, : attention.q_size].unflatten(-1, (-1, attention.head_dim))
        if (norm := getattr(attention, "q_norm", None)) is not None:
            query = norm(query.contiguous())
        query = query.float()
        if get_tensor_model_parallel_world_size() == 1:
            return query
        return tensor_model_parallel_all_gather(query.contiguous(), dim=1)
