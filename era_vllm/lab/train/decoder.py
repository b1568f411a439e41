"""A language model's layers over packed rows, the last one only where something is to be said.

transformers' own layers are called as they are; of the last one, queries, the MLP and the norm are
worked out for a tenth of the tokens. The rest of that layer would be thrown away.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # Qwen3-VL's is the same

from era_vllm.lab.train.batch import Batch
from era_vllm.lab.train.packing import NO_TARGET


def last_states(
    language: Any, batch: Batch, positions: Tensor, visual: Tensor, seen: Sequence[Tensor]
) -> Tensor:
    """Return the last states where a token is to follow, [t, d], row by row.

    Args:    positions: as the family's rotary embedding takes them.   visual: [b, n], where.
             seen: [v, d] each: what stands there, and DeepStack's for each of the first layers.
    """
    where, (first, *maps) = visual[..., None], seen
    hidden = language.embed_tokens(batch.ids)
    hidden = hidden.masked_scatter(where, first.to(hidden.dtype))
    turned = language.rotary_emb(hidden, position_ids=positions)
    *layers, last = language.layers
    for index, layer in enumerate(layers):
        hidden = layer(hidden, attention_mask=batch.mask, position_embeddings=turned)
        if index < len(maps):
            what = maps[index].to(hidden.dtype)
            hidden = hidden + torch.zeros_like(hidden).masked_scatter(where, what)
    return language.norm(_last(last, hidden, batch, turned))


def _last(layer: Any, hidden: Tensor, batch: Batch, turned: tuple[Tensor, Tensor]) -> Tensor:
    """Return the states of one layer where a token is to follow, [t, d]."""
    told, mask = batch.targets != NO_TARGET, batch.mask
    attention, (rows, width) = layer.self_attn, (hidden.shape[0], hidden.shape[-1])
    most = int(told.sum(1).max())
    chosen = told.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]  # [b, m]
    real = told.gather(1, chosen)
    normed = layer.input_layernorm(hidden)
    wide = chosen[..., None].expand(-1, -1, width)

    def heads(projected: Tensor, norm: Any) -> Tensor:
        split = projected.view(rows, projected.shape[1], -1, attention.head_dim)
        return (split if norm is None else norm(split)).transpose(1, 2)

    query = heads(attention.q_proj(normed.gather(1, wide)), getattr(attention, "q_norm", None))
    key = heads(attention.k_proj(normed), getattr(attention, "k_norm", None))
    value = heads(attention.v_proj(normed), None)
    cos, sin = (each.expand(rows, -1, -1) for each in turned)
    places = chosen[..., None].expand(-1, -1, cos.shape[-1])
    query, _ = apply_rotary_pos_emb(query, query, cos.gather(1, places), sin.gather(1, places))
    key, _ = apply_rotary_pos_emb(key, key, cos, sin)
    seen = mask.gather(2, chosen[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
    mixed = F.scaled_dot_product_attention(
        query, key, value, seen.to(query.dtype), scale=attention.scaling, enable_gqa=True
    )
    mixed = mixed.transpose(1, 2).reshape(rows, most, -1)
    states = (hidden.gather(1, wide) + attention.o_proj(mixed))[real]
    return states + layer.mlp(layer.post_attention_layernorm(states))
