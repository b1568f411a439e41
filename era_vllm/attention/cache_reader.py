"""Reads slots back out of the engine's own KV cache: for tests, ``doctor`` and debugging.

Backends pack a block in ways of their own (the CPU's depends on the instruction set). Instead of
knowing each layout, we learn it: numbers that say where they came from go through the backend's
own cache write into a scratch block, and the inverse of what came out is applied to real blocks.
Slow, and never in the path of a step.
"""

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from era_vllm.attention.layer import RectifiedAttention, stored_dtype
from era_vllm.compat import attention_impl
from era_vllm.errors import CacheError

_BASE = 16  # digits + 1 are exact in every cache dtype, fp8-e4m3 included


def read_bias(
    layer: RectifiedAttention, slots: Int[Tensor, "m"], block_size: int
) -> Float32[Tensor, "m hkv"]:
    """Return the bias that each slot holds, per KV head: gamma x log_bias where gamma is set.

    Args:
        layer: A rectified layer whose cache has been allocated.
        slots: Slot indices: block * block_size + offset.
        block_size: Slots of a block.

    Raises:
        CacheError: the cache cannot be read on this backend.
    """
    rows = read_rows(layer, slots, block_size)
    return layer.store.read(rows, layer.unwidened_head_size, attention_impl.scale_of(layer))


def read_rows(
    layer: RectifiedAttention, slots: Int[Tensor, "m"], block_size: int
) -> Float[Tensor, "m hkv dw"]:
    """Return the slots' widened rows that hold the bias (keys or values), cache scale undone."""
    cache = layer.kv_cache
    known = cache.ndim == 4 and cache.shape[1] == layer.num_kv_heads
    if cache.device.type != "cpu" or not known:  # a GPU's has the same shape, and another order
        raise CacheError(
            f"KV cache of shape {tuple(cache.shape)} on {cache.device.type}: reading slots back is "
            f"only known for caches [blocks, {layer.num_kv_heads} heads, ...] of the CPU backend"
        )
    where = _positions(layer, block_size)
    block, offset = slots // block_size, slots % block_size
    rows = _values(layer, cache[block]).float().flatten(2)
    picked = rows.gather(2, where[offset][:, None].expand(-1, layer.num_kv_heads, -1))
    return picked * _scale(layer)


def _scale(layer: RectifiedAttention) -> float:
    return attention_impl.cache_scale(layer, layer.store.scaled)


def _positions(layer: RectifiedAttention, block_size: int) -> Int[Tensor, "p dw"]:
    """Learn where a block keeps channel c of the row at offset p."""
    size, heads = layer.head_size, layer.num_kv_heads
    scratch = torch.zeros_like(layer.kv_cache[:1])
    slots = torch.arange(block_size)
    code = torch.arange(block_size * size).view(block_size, 1, size)
    found = torch.zeros(scratch[0, 0].numel(), dtype=torch.int64)
    is_row = torch.zeros_like(found, dtype=torch.bool)
    place = 1
    while place < block_size * size:
        digit = (code // place % _BASE + 1).to(layer.dtype) * _scale(layer)
        row = digit.expand(-1, heads, -1).contiguous()
        nothing = torch.zeros_like(row)
        pair = (row, nothing) if layer.store.scaled == "k" else (nothing, row)
        attention_impl.write_slots(layer, *pair, scratch, slots)
        read = _values(layer, scratch)[0, 0].flatten().float().round().long()
        is_row |= read > 0
        found += (read - 1).clamp_min(0) * place
        place *= _BASE
    raw = is_row.nonzero().flatten()
    if raw.numel() != block_size * size:
        raise CacheError(
            f"KV cache: found {raw.numel()} values in a block, expected {block_size * size}"
        )
    positions = torch.zeros(block_size * size, dtype=torch.int64)
    positions[found[raw]] = raw
    return positions.view(block_size, size)


def _values(layer: RectifiedAttention, cache: Tensor) -> Tensor:
    """View a byte cache (fp8) as numbers."""
    stored = stored_dtype(layer)
    return cache if cache.dtype == stored else cache.view(stored)
