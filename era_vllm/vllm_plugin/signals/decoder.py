"""The first layers of a language model, called one by one on rows that are in no KV cache.

Its own modules (norms, projections, rotary embedding, MLP) with plain causal attention in place of
``Attention``: that is never called, so that no forward context is needed and a compiled model is
left as it is. Under tensor parallelism the projections reduce by themselves, and heads are a
rank's own. Leaves out what is run through them, and why (``scout.py``).
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from era_vllm.errors import UnsupportedError
from era_vllm.vllm_plugin.positions import built_rows

_MODELS: Final = frozenset(
    {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "Qwen3LLMModel"}
)
"""vLLM's language models that are embeddings and then layers, nothing between."""
_LAYERS: Final = {
    "LlamaDecoderLayer": "LlamaAttention",
    "MistralDecoderLayer": "MistralAttention",
    "Qwen2DecoderLayer": "Qwen2Attention",
    "Qwen3DecoderLayer": "Qwen3Attention",
    "Qwen3VLDecoderLayer": "Qwen3Attention",
}
"""Their layers that do what is done here, and the attention of each."""
_DEEP: Final = "Qwen3LLMModel"
"""The one that adds a map of the encoder to the tokens behind each of its first layers."""
_UNKNOWN: Final = ("ada_rms_norm_t_cond", "do_llama_4_scaling", "dual_chunk_attention_config")
"""What some of these layers may do beside it."""

_INSTEAD: Final = "; leave --era-scout out, or choose another policy with --era-policy, such as dpp"


class Before(NamedTuple):
    """What a layer keeps of tokens that others will follow."""

    key: Float[Tensor, "b hkv n dh"]
    value: Float[Tensor, "b hkv n dh"]


class Heads(NamedTuple):
    """Queries, keys and values of this rank's heads."""

    query: Float[Tensor, "b hq t dh"]
    key: Float[Tensor, "b hkv m dh"]
    """Of the tokens before, then of the t."""
    value: Float[Tensor, "b hkv m dh"]

    def kept(self, members: Int[Tensor, "a"]) -> Before:
        """Return a copy for some of a batch: what they are views of may go."""
        return Before(self.key[members], self.value[members])

    def behind(self, before: Before) -> "Heads":
        """Return the same of tokens that follow others."""
        keys, values = (torch.cat(pair, 2) for pair in zip(before, self[1:], strict=True))
        return Heads(self.query, keys, values)


class Decoder:
    """Layers by index; rows [m, d] are those of a batch, b times t of them."""

    def __init__(self, language_model: nn.Module, needed: int, width: int | None) -> None:
        """Find the layers.

        Args:
            needed: How many.
            width: Columns of a row that are the token, the others its maps; None = all.

        Raises:
            UnsupportedError: a language model whose layers are not known here, or fewer of them.
        """
        self._model: Any = getattr(language_model, "model", None)
        _check(language_model, self._model, needed, width)
        self.last = built_rows(language_model) - 1
        """Last position of the rotary table."""

    def embedded(self, ids: Int[Tensor, "t"]) -> Float[Tensor, "t d"]:
        """Return the embeddings of text."""
        return self._model.embed_tokens(ids)

    def scale(self, index: int) -> float:
        """Return what a layer's attention scores are multiplied with."""
        return self._model.layers[index].self_attn.scaling

    def projected(
        self, index: int, hidden: Float[Tensor, "m d"], residual: Float[Tensor, "m d"] | None
    ) -> tuple[list[Float[Tensor, "m h dh"]], Float[Tensor, "m d"]]:
        """Return a layer's queries, keys and values before its rotary embedding, and the residual.

        On CUDA ``hidden`` and ``residual`` are written over, but for the first layer's.
        """
        layer = self._model.layers[index]
        if residual is None:
            normed, residual = layer.input_layernorm(hidden), hidden
        else:
            normed, residual = layer.input_layernorm(hidden, residual)
        attention = layer.self_attn
        joined, _ = attention.qkv_proj(normed)
        sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        parts = [part.unflatten(-1, (-1, attention.head_dim)) for part in joined.split(sizes, -1)]
        for place, name in enumerate(("q_norm", "k_norm")):
            if (norm := getattr(attention, name, None)) is not None:
                parts[place] = norm(parts[place].contiguous())
        return parts, residual

    def turned(
        self,
        index: int,
        parts: Sequence[Float[Tensor, "m h dh"]],
        positions: Int[Tensor, "m"] | Int[Tensor, "p m"],
        batch: int,
    ) -> Heads:
        """Return them behind the rotary embedding, by the batch's members."""
        query, key, value = parts
        attention = self._model.layers[index].self_attn
        query, key = attention.rotary_emb(
            positions, query.flatten(1).contiguous(), key.flatten(1).contiguous()
        )
        return Heads(
            *(
                one.reshape(
                    batch, -1, one[0].numel() // attention.head_dim, attention.head_dim
                ).transpose(1, 2)
                for one in (query, key, value)
            )
        )

    def onwards(
        self, index: int, heads: Heads, residual: Float[Tensor, "m d"]
    ) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m d"]]:
        """Return what comes out of a layer, and the residual. On CUDA that is written over."""
        layer = self._model.layers[index]
        hidden, _ = layer.self_attn.o_proj(_attended(heads, layer.self_attn.scaling))
        hidden, residual = layer.post_attention_layernorm(hidden, residual)
        return layer.mlp(hidden), residual


def _attended(heads: Heads, scale: float) -> Float[Tensor, "m hq_dh"]:
    """Return plain causal attention within each member of a batch."""
    query, key, value = heads
    groups = query.shape[1] // key.shape[1]
    words, before = query.shape[2], key.shape[2] - query.shape[2]
    mask = None
    if before:
        mask = torch.ones(words, words + before, dtype=torch.bool, device=query.device).tril(before)
    out = scaled_dot_product_attention(
        query,
        key.repeat_interleave(groups, 1),
        value.repeat_interleave(groups, 1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def _check(language_model: nn.Module, model: Any, needed: int, width: int | None) -> None:  # noqa: ANN401
    name, kind = type(language_model).__name__, type(model).__name__
    if kind not in _MODELS or (width is not None and kind != _DEEP):
        raise UnsupportedError(
            f"scout of {name}: got {kind}{'' if width is None else ' with feature maps'}, allowed: "
            f"{', '.join(sorted(_MODELS))}{_INSTEAD}"
        )
    layers: Sequence[Any] = model.layers
    if needed > len(layers):
        raise UnsupportedError(
            f"scout of {name}: got {needed} layers, allowed: up to {len(layers)}, its own{_INSTEAD}"
        )
    for index, layer in enumerate(layers[:needed]):
        attention = getattr(layer, "self_attn", None)
        found = type(layer).__name__, type(attention).__name__
        more = [
            name
            for name in _UNKNOWN
            if getattr(layer, name, None) or getattr(attention, name, None)
        ]
        mlp = type(getattr(layer, "mlp", None)).__name__
        more += [] if mlp.endswith("MLP") else [mlp]
        if found not in _LAYERS.items() or more:
            raise UnsupportedError(
                f"scout of {name}: got layer {index + 1} of {' with '.join([*found, *more])}, "
                f"allowed: {', '.join(sorted(_LAYERS))}, held by every rank{_INSTEAD}"
            )
