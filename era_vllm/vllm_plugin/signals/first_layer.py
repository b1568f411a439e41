"""Queries and keys of the language model's first layer, of each token alone.

Its own modules are called: input norm, projection, query and key norm. ``Attention`` is not, so no
forward context is needed and a compiled model is left as it is. Before the rotary embedding. Under
tensor parallelism each rank holds some heads. Leaves out later layers, whose states depend on what
stands before a token.
"""

from typing import Final

from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from era_vllm.errors import UnsupportedError

_READ: Final = frozenset(
    {
        *("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"),
        "Qwen3MoeAttention",
    }
)
"""vLLM's attention modules that make queries and keys as here: ``qkv_proj``, then norms if any."""


class FirstLayer:
    """The layer, and the table that words come from."""

    def __init__(self, language_model: nn.Module) -> None:
        """Find them.

        Raises:
            UnsupportedError: a first layer that is another rank's, or makes queries otherwise.
        """
        body = getattr(language_model, "model", None)
        layers = getattr(body, "layers", None)
        layer = layers[0] if layers else None
        attention = getattr(layer, "self_attn", None)
        if type(attention).__name__ not in _READ or getattr(attention, "do_llama_4_scaling", False):
            found = type(layer if attention is None else attention).__name__
            raise UnsupportedError(
                f"queries of the first layer of {type(language_model).__name__}: got {found}, "
                f"allowed: {', '.join(sorted(_READ))}, held by every rank; choose another policy "
                "with --era-policy, such as dpp"
            )
        self._norm, self._attention, self._body = layer.input_layernorm, attention, body

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self._attention.scaling

    def words(self, ids: Int[Tensor, "m"]) -> Float[Tensor, "m d"]:
        """Return tokens of text as they come to the layer."""
        return self._body.embed_tokens(ids)

    def queries(self, states: Float[Tensor, "m d"]) -> Float32[Tensor, "m hq dh"]:
        """Return the queries of this rank's heads."""
        joined = self._projected(states)[:, : self._attention.q_size]
        return self._normed(joined, "q_norm")

    def keys(self, states: Float[Tensor, "m d"]) -> Float32[Tensor, "m hkv dh"]:
        """Return the keys of this rank's KV heads."""
        own = self._attention
        joined = self._projected(states)[:, own.q_size : own.q_size + own.kv_size]
        return self._normed(joined, "k_norm")

    def _projected(self, states: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        joined, _ = self._attention.qkv_proj(self._norm(states))
        return joined

    def _normed(self, joined: Float[Tensor, "m c"], name: str) -> Float32[Tensor, "m h dh"]:
        rows = joined.unflatten(-1, (-1, self._attention.head_dim))
        if (norm := getattr(self._attention, name, None)) is not None:
            rows = norm(rows.contiguous())
        return rows.float()
