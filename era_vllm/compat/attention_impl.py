"""What vLLM's ``Attention`` and its backend's implementation know, but do not offer.

Upstream (0.32.0), vllm/model_executor/layers/attention/attention.py: constructor arguments end up
on ``Attention.impl`` (:432), the scales of an fp8 cache on the layer as ``_k_scale`` and host
copies (:135, quantization/kv_cache.py:180); the cache write is ``impl.do_kv_cache_update``
(v1/attention/backends/cpu_attn.py:516). The head size that builders and KV connectors ask for is
``model_arch_config.head_size`` (v1/attention/backends/triton_attn.py:113).
Private use: build a wider layer from a stock one, fit the scales to its columns, write slots for
``cache_reader``, and announce the wider head.
Remove when: vLLM's attention takes a bias per key, or layers can be built from layers.
"""

import inspect
from typing import Final, Literal

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend as AttentionBackend
from vllm.v1.attention.backend import AttentionType

from era_vllm.errors import UnsupportedError

Scaled = Literal["q", "k", "v"]
DECODER: Final = AttentionType.DECODER
SCALED: Final[tuple[Scaled, ...]] = ("q", "k", "v")


def constructor_arguments(stock: Attention, vllm_config: VllmConfig) -> dict[str, object]:
    """Return the keyword arguments that a layer was built with, but for its head size."""
    slopes, sinks = getattr(stock.impl, "alibi_slopes", None), sinks_of(stock)
    return {
        "num_heads": stock.num_heads,
        "scale": scale_of(stock),
        "num_kv_heads": stock.num_kv_heads,
        "alibi_slopes": None if slopes is None else slopes.tolist(),
        "use_alibi_sqrt": stock.use_alibi_sqrt,
        "cache_config": vllm_config.cache_config,
        "quant_config": stock.quant_config,
        "logits_soft_cap": soft_cap_of(stock),
        "per_layer_sliding_window": stock.sliding_window,
        "prefix": stock.layer_name,
        "kv_sharing_target_layer_name": stock.kv_sharing_target_layer_name,
        **({} if sinks is None else {"sinks": sinks}),
    }


def differences(stock: Attention, wider: Attention) -> list[str]:
    """Return the constructor arguments that two layers' implementations do not share.

    What is no plain value (slopes, sinks), and the head's size, are left out; so is what an
    implementation chooses itself (a wider head may have another version of a kernel).
    """
    old, new = vars(stock.impl), vars(wider.impl)
    given = inspect.signature(type(stock.impl).__init__).parameters
    plain = bool | int | float | str | tuple | None
    apart = [
        name
        for name in given
        if name not in ("head_size", "logits_soft_cap")
        and name in old.keys() & new.keys()
        and isinstance(old[name], plain)
        and old[name] != new[name]
    ]
    return apart + ["logits_soft_cap"] * (soft_cap_of(stock) != soft_cap_of(wider))


def scale_of(layer: Attention) -> float:
    """Return the softmax scale."""
    return layer.impl.scale


def soft_cap_of(layer: Attention) -> float | None:
    """Return the soft cap of the scores; backends keep "none" as None or 0."""
    return getattr(layer.impl, "logits_soft_cap", None) or None


def sinks_of(layer: Attention) -> Tensor | None:
    """Return the attention sinks, one a head."""
    return getattr(layer.impl, "sinks", None)


def cache_scale(layer: Attention, tensor: Scaled) -> float:
    """Return the number that an fp8 cache divides queries, keys or values by.

    Raises:
        UnsupportedError: one scale a head.
    """
    if (count := getattr(layer, f"_{tensor}_scale").numel()) != 1:
        raise UnsupportedError(
            f"{layer.layer_name}: {count} fp8 scales of {tensor!r}, one a head; a bias is only "
            'stored with one a layer (kv_cache_scheme "strategy": "tensor")'
        )
    return getattr(layer, f"_{tensor}_scale_float")


def set_cache_scale(layer: Attention, tensor: Scaled, value: float) -> None:
    """Set the scale and its host copies; addresses stay (CUDA graphs)."""
    getattr(layer, f"_{tensor}_scale").fill_(value)
    setattr(layer, f"_{tensor}_scale_float", value)
    if (on_host := getattr(layer, f"_{tensor}_scale_cpu", None)) is not None:
        on_host.fill_(value)


def for_truncating_cache(layer: Attention, tensor: Scaled, x: Tensor) -> Tensor:
    """Round to what an fp8 cache can hold, since vLLM's CPU cache write truncates.

    Truncation makes keys and values about 4 % too small: answers are two to six times as far off
    as with rounding. The result is raised by 1/64, an eighth to a quarter of fp8's step, so that
    neither a scale that is no power of two nor a cache write that rounds changes what is held.
    Upstream: ``ops.cpu_attn_reshape_and_cache`` (csrc/cpu/). Remove when it rounds.
    """
    if not (current_platform.is_cpu() and layer.kv_cache_dtype in ("fp8", "fp8_e4m3")):
        return x
    scale = cache_scale(layer, tensor)
    held = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return (held * (scale * 65 / 64)).to(x.dtype)


def write_slots(layer: Attention, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Write rows into the slots of a cache with the backend's own cache write."""
    layer.impl.do_kv_cache_update(layer, key, value, cache, slots)


def announce_head_size(vllm_config: VllmConfig, head_size: int) -> None:
    """Tell what does not follow the KV cache spec.

    Triton's split-KV scratch, LMCache's pages and NIXL's hash.
    """
    vllm_config.model_config.model_arch_config.head_size = head_size
