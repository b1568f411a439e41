"""The scout: the first layers of the language model, run on each picture alone before it is pruned.

Its own modules are called on the encoder's rows (norms, projections, rotary embedding, MLP), with
plain causal attention in place of ``Attention``: that is never called, so that no forward context
and no KV cache are needed and a compiled model is left as it is. Before the picture stands the
prefix (``scout_prefix.py``); tokens have the positions they have unpruned. Under tensor parallelism
the projections reduce by themselves, and the heads of queries are gathered, so that every rank
chooses the same anchors. Leaves out who compares by the states (``VisualTokens.compared``).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)

from era_vllm.errors import UnsupportedError
from era_vllm.layout import Layout
from era_vllm.types import Signal
from era_vllm.vllm_plugin.fields import Planned
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


class Scout:
    """Gives states, or queries of a later layer, for the rows of a pass."""

    def __init__(
        self,
        language_model: nn.Module,
        prefix: Sequence[int],
        *,
        layers: int,
        query_layer: int = 0,
        width: int | None,
        most: int,
        every_layer: bool = False,
    ) -> None:
        """Find the layers.

        Args:
            prefix: Token ids before each picture.
            layers: Layers whose last output is given as states; 0 = none are.
            query_layer: Layer, from 1, whose queries are given; 0 = none are.
            width: Columns of a row that are the token, the others its maps; None = all.
            most: Rows that are run at once, prefix included; a longer picture runs alone.
            every_layer: Give each layer's output too, for injection.

        Raises:
            UnsupportedError: a language model whose layers are not known here, or fewer of them.
        """
        self._model: Any = getattr(language_model, "model", None)
        _check(language_model, self._model, max(layers, query_layer), width)
        self._states, self._query_layer = layers, query_layer
        self._prefix = torch.tensor(list(prefix), dtype=torch.int64, device="cpu")
        self._width, self._most = width, most
        self._last = built_rows(language_model) - 1
        given = {
            Signal.SCOUT_STATES: layers > 0,
            Signal.SCOUT_LAYERS: every_layer,
            Signal.LANGUAGE_QUERIES: query_layer > 0,
        }
        self.gives = frozenset(signal for signal, wanted in given.items() if wanted)

    def before(self, items: Sequence[Planned]) -> None:
        """Nothing to get ready."""

    def after(
        self, items: Sequence[Planned], rows: Sequence[Tensor]
    ) -> Mapping[Signal, Sequence[Tensor]]:
        """Return float32 [d, length] and [hq, dh, length] of each item."""
        found: dict[tuple[Signal, int], Tensor] = {}
        for members in batches([len(own) for own in rows], len(self._prefix), self._most):
            layouts = [items[index].plan.layout for index in members]
            seen = self._run(layouts, torch.stack([rows[index] for index in members]))
            for signal, values in seen.items():
                for row, index in enumerate(members):
                    found[signal, index] = values[row].movedim(0, -1)
        return {s: [found[s, index] for index in range(len(items))] for s in self.gives}

    def _run(
        self, layouts: Sequence[Layout], rows: Float[Tensor, "b n c"]
    ) -> dict[Signal, Float32[Tensor, "b n *c"]]:
        """Run the layers on pictures of one length."""
        batch, start, device = len(layouts), len(self._prefix), rows.device
        if self._prefix.device != device:
            self._prefix = self._prefix.to(device, non_blocking=True)
        tokens, *maps = rows.split(self._width or rows.shape[-1], -1)
        before = self._model.embed_tokens(self._prefix).to(rows.dtype)
        hidden = torch.cat([before.expand(batch, -1, -1), tokens], 1).flatten(0, 1)
        residual: Tensor | None = None
        places = [_positions(one, start, self._last, device) for one in layouts]
        positions = torch.cat(places, -1)

        def own(x: Tensor) -> Tensor:
            return x.unflatten(0, (batch, -1))[:, start:]

        seen: dict[Signal, Tensor] = {}
        of_layers: list[Float32[Tensor, "b n d"]] = []
        for index in range(max(self._states, self._query_layer)):
            layer = self._model.layers[index]
            normed, residual = _normed(layer.input_layernorm, hidden, residual)
            query, key, value = _projected(layer.self_attn, normed)
            if index + 1 == self._query_layer:
                seen[Signal.LANGUAGE_QUERIES] = _all_heads(own(query).float())
                if index >= self._states:
                    break
            out = _attended(layer.self_attn, positions, query, key, value, batch)
            hidden, _ = layer.self_attn.o_proj(out)
            hidden, residual = layer.post_attention_layernorm(hidden, residual)
            hidden = layer.mlp(hidden)
            if Signal.SCOUT_LAYERS in self.gives and index < self._states:
                of_layers.append(own(hidden).float() + own(residual).float())
            if index < len(maps):
                own(hidden).add_(maps[index])
            if index + 1 == self._states:
                seen[Signal.SCOUT_STATES] = own(hidden).float() + own(residual).float()
        if of_layers:
            seen[Signal.SCOUT_LAYERS] = torch.cat(of_layers, -1)
        return seen


def batches(lengths: Sequence[int], prefix: int, most: int) -> Iterator[list[int]]:
    """Yield indices of items of equal length, of as many as have ``most`` rows or fewer, or one."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    for length, members in groups.items():
        at_once = max(1, most // (prefix + length))
        for first in range(0, len(members), at_once):
            yield members[first : first + at_once]


@lru_cache(maxsize=256)
def _positions(
    layout: Layout, prefix: int, last: int, device: torch.device
) -> Int[Tensor, "m"] | Int[Tensor, "p m"]:
    """Return the positions of the prefix and of an item's places behind it.

    Of runs one behind another, without the text between them. Past ``last`` (with compact
    positions a picture may be longer than the rotary table) they stay there.
    """
    starts = [0, *accumulate(layout.spans)][:-1]
    of_runs = torch.tensor(starts).repeat_interleave(torch.tensor(layout.run_lengths))
    own = prefix + of_runs[:, None] + layout.position_offsets
    before = torch.arange(prefix)[:, None].expand(-1, own.shape[1])
    found = torch.cat([before, own]).clamp(max=last).T.contiguous()
    found = found.to(device, non_blocking=True)
    return found[0] if len(found) == 1 else found


def _normed(norm: nn.Module, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what a layer's first norm gives, and the residual. On CUDA both are written over."""
    return (norm(hidden), hidden) if residual is None else norm(hidden, residual)


def _projected(attention: Any, normed: Float[Tensor, "m d"]) -> list[Float[Tensor, "m h dh"]]:  # noqa: ANN401
    """Return queries, keys and values of this rank's heads, before their rotary embedding."""
    joined, _ = attention.qkv_proj(normed)
    sizes = [attention.q_size, attention.kv_size, attention.kv_size]
    parts = [part.unflatten(-1, (-1, attention.head_dim)) for part in joined.split(sizes, -1)]
    for index, name in enumerate(("q_norm", "k_norm")):
        if (norm := getattr(attention, name, None)) is not None:
            parts[index] = norm(parts[index].contiguous())
    return parts


def _attended(
    attention: Any,  # noqa: ANN401
    positions: Tensor,
    query: Float[Tensor, "m hq dh"],
    key: Float[Tensor, "m hkv dh"],
    value: Float[Tensor, "m hkv dh"],
    batch: int,
) -> Float[Tensor, "m hq_dh"]:
    """Return plain causal attention within each picture."""
    query, key = attention.rotary_emb(
        positions, query.flatten(1).contiguous(), key.flatten(1).contiguous()
    )
    groups = attention.num_heads // attention.num_kv_heads

    def by_head(x: Tensor, copies: int = 1) -> Float[Tensor, "b h t dh"]:
        heads = x.reshape(batch, -1, x.shape[1] // attention.head_dim, attention.head_dim)
        return heads.transpose(1, 2).repeat_interleave(copies, 1)

    out = scaled_dot_product_attention(
        by_head(query),
        by_head(key, groups),
        by_head(value.flatten(1), groups),
        is_causal=True,
        scale=attention.scaling,
    )
    return out.transpose(1, 2).reshape(len(query), -1)


def _all_heads(queries: Float[Tensor, "b n h dh"]) -> Float[Tensor, "b n hq dh"]:
    if get_tensor_model_parallel_world_size() == 1:
        return queries
    return tensor_model_parallel_all_gather(queries.contiguous(), dim=2)


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
