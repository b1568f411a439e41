"""The rectified attention layer: vLLM's own ``Attention``, widened, swapped into a language model.

``swap`` replaces every ``self_attn.attn`` by a subclass under the same name, so that parameter
names, isinstance checks, the KV cache spec and the layer name stay vLLM's. Nothing else is told:
the page size follows from the wider head, and the backend is vLLM's choice for it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

from era_vllm.attention.bias_buffer import BiasBuffer
from era_vllm.compat import static_forward_context
from era_vllm.contracts import BiasStore
from era_vllm.errors import UnsupportedError


class RectifiedAttention(Attention):
    """``Attention`` whose keys carry a per-token bias in extra columns of the head."""

    def __init__(
        self, stock: Attention, store: BiasStore, buffer: BiasBuffer, vllm_config: VllmConfig
    ) -> None:
        impl = stock.impl
        sinks = getattr(impl, "sinks", None)
        slopes = getattr(impl, "alibi_slopes", None)
        super().__init__(
            stock.num_heads,
            widened_head_size(stock, store),
            impl.scale,
            num_kv_heads=stock.num_kv_heads,
            alibi_slopes=None if slopes is None else slopes.tolist(),
            use_alibi_sqrt=stock.use_alibi_sqrt,
            cache_config=vllm_config.cache_config,
            quant_config=stock.quant_config,
            per_layer_sliding_window=stock.sliding_window,
            prefix=stock.layer_name,
            kv_sharing_target_layer_name=stock.kv_sharing_target_layer_name,
            **({} if sinks is None else {"sinks": sinks}),
        )
        self.unwidened_head_size = stock.head_size
        self.store = store
        self.buffer = buffer

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Adapt the fp8 cache scale that the columns are divided by: calibrated without them."""
        super().process_weights_after_loading(act_dtype)
        if stored_dtype(self) != torch.float8_e4m3fn:
            return
        name = f"_{self.store.scaled}_scale"
        scale = self.store.cache_scale(getattr(self, f"{name}_float"))
        getattr(self, name).fill_(scale)
        setattr(self, f"{name}_float", scale)
        setattr(self, f"{name}_cpu", torch.tensor(scale))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Append the step's columns, attend in vLLM, cut the output back.

        Args:
            query: [t, hq * dh]; key, value: [t, hkv * dh].

        Returns:
            [t, hq * dh], as the stock layer.
        """
        tokens, size = query.shape[0], self.unwidened_head_size
        wide = self.store.before(
            query.view(tokens, self.num_heads, size),
            key.view(tokens, self.num_kv_heads, size),
            value.view(tokens, self.num_kv_heads, size),
            self.buffer.columns[:tokens],
        )
        out = super().forward(*wide, output_dtype=output_dtype)
        narrow = self.store.after(out.view(tokens, self.num_heads, self.head_size), size)
        return narrow.reshape(tokens, self.num_heads * size)


def swap(
    language_model: nn.Module,
    vllm_config: VllmConfig,
    make_store: Callable[[torch.dtype], BiasStore],
) -> BiasBuffer:
    """Replace every attention layer of the language model; call at the end of a model's __init__.

    Args:
        make_store: KV cache dtype -> bias store.

    Returns:
        The buffer that one step's biases are written to, shared by all layers.

    Raises:
        UnsupportedError: a layer that cannot be widened exactly.
        CacheError: vLLM's layer table does not hold a layer under its own name.
    """
    owners = [
        m for m in language_model.modules() if isinstance(getattr(m, "attn", None), Attention)
    ]
    if not owners:
        raise UnsupportedError(
            f"{type(language_model).__name__} has no self_attn.attn layer of vLLM's Attention, "
            "so a bias cannot be attached; allowed: decoder-only models with standard attention"
        )
    first: Attention = owners[0].attn
    store = make_store(stored_dtype(first))
    width = widened_head_size(first, store) - first.head_size
    scheduler = vllm_config.scheduler_config
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    rows = max(scheduler.max_num_batched_tokens, graphs)
    buffer = BiasBuffer(rows, width, store, first.impl.scale, torch.get_default_dtype())
    for owner in owners:
        stock: Attention = owner.attn
        _check(stock, first, store)
        static_forward_context.release(vllm_config, stock)
        owner.attn = RectifiedAttention(stock, store, buffer, vllm_config)
    # Triton's split-KV scratch, LMCache's pages and NIXL's hash are sized by this number, not by
    # the KV cache spec (v1/attention/backends/triton_attn.py:113).
    vllm_config.model_config.model_arch_config.head_size = first.head_size + width
    return buffer


def stored_dtype(layer: Attention) -> torch.dtype:
    """Return the number format of the layer's KV cache (vLLM keeps fp8 as bytes)."""
    if layer.kv_cache_dtype in ("fp8", "fp8_e4m3"):
        return torch.float8_e4m3fn
    return layer.kv_cache_torch_dtype


def widened_head_size(stock: Attention, store: BiasStore) -> int:
    """Return the smallest head size that holds the store's columns and that the platform takes.

    On a GPU a multiple of 8, and vLLM selects the backend anew for it. On a CPU one of a fixed
    list; its fp8 cache wants multiples of 32 although no ``supports_*`` call says so.
    """
    needed = stock.head_size + store.extra_columns
    if not current_platform.is_cpu():
        return -(-needed // 8) * 8
    step = 32 if stock.kv_cache_dtype.startswith("fp8") else 16
    sizes = stock.attn_backend.get_supported_head_sizes()
    fitting = [size for size in sizes if size >= needed and size % step == 0]
    if not fitting:
        raise UnsupportedError(
            f"{stock.layer_name}: head size {stock.head_size} + {store.extra_columns} columns; the "
            f"CPU backend takes {sizes}; choose a model with a smaller head size"
        )
    return min(fitting)


def _check(stock: Attention, first: Attention, store: BiasStore) -> None:
    name = stock.layer_name
    if type(stock) is not Attention or stock.attn_type != AttentionType.DECODER:
        raise UnsupportedError(
            f"{name}: got {type(stock).__name__} ({stock.attn_type}); only vLLM's plain decoder "
            "Attention can carry a bias"
        )
    if (stock.head_size, stock.head_size_v) != (first.head_size, first.head_size):
        raise UnsupportedError(
            f"{name}: head sizes {stock.head_size}/{stock.head_size_v} differ from the first "
            f"layer's {first.head_size}; layers of one size are needed"
        )
    if stock.kv_cache_torch_dtype != first.kv_cache_torch_dtype:
        raise UnsupportedError(
            f"{name}: KV cache of {stock.kv_cache_torch_dtype}, the first layer's is "
            f"{first.kv_cache_torch_dtype}; one dtype is needed (kv_cache_dtype_skip_layers)"
        )
    if getattr(stock.impl, "logits_soft_cap", None) and not store.limits.soft_cap:
        raise UnsupportedError(f"{name}: attention scores are soft-capped, which the store breaks")
    if getattr(stock.impl, "sinks", None) is not None and not store.limits.sinks:
        raise UnsupportedError(f"{name}: attention sinks, which the store breaks")
