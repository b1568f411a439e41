"""The rectified attention layer: vLLM's own ``Attention``, widened, swapped into a language model.

``swap`` replaces every ``self_attn.attn`` by a subclass under the same name, so that parameter
names, isinstance checks, the KV cache spec and the layer name stay vLLM's. Nothing else is told:
the page size follows from the wider head, and the backend is vLLM's choice for it.
"""

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from era_vllm.attention.bias_buffer import BiasBuffer
from era_vllm.attention.bias_store import make_store
from era_vllm.compat import attention_impl, cpu_attention, static_forward_context
from era_vllm.config import EraConfig
from era_vllm.contracts import BiasStore
from era_vllm.errors import UnsupportedError


class RectifiedAttention(Attention):
    """``Attention`` whose keys carry a per-token bias in extra columns of the head."""

    def __init__(
        self,
        stock: Attention,
        store: BiasStore,
        buffer: BiasBuffer,
        index: int,
        vllm_config: VllmConfig,
    ) -> None:
        """Build a wider layer from a stock one.

        Args:
            index: Of the layer in the language model, from 0.
        """
        arguments = attention_impl.constructor_arguments(stock, vllm_config)
        super().__init__(head_size=_widened(stock, store), **arguments)
        self.unwidened_head_size = stock.head_size
        self.store = store
        self.buffer = buffer
        self.index = index
        self.fitted_scales: dict[str, float] = {}

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Fit the fp8 cache's scales to the columns: they were calibrated without them.

        Runs again when weights are loaded anew; a scale that is still ours is left alone.
        """
        super().process_weights_after_loading(act_dtype)
        if stored_dtype(self) != torch.float8_e4m3fn:
            return
        for tensor in attention_impl.SCALED:
            given = attention_impl.cache_scale(self, tensor)
            if given != self.fitted_scales.get(tensor):
                fitted = self.store.cache_scale(tensor, given)
                self.fitted_scales[tensor] = fitted
                attention_impl.set_cache_scale(self, tensor, fitted)

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
        wide_query, wide_key, wide_value = self.store.before(
            query.view(tokens, self.num_heads, size),
            key.view(tokens, self.num_kv_heads, size),
            value.view(tokens, self.num_kv_heads, size),
            self.buffer.of_layer(self.index, tokens),
        )
        out = super().forward(
            wide_query.flatten(1),  # vLLM quantises queries of two dimensions only
            attention_impl.for_truncating_cache(self, "k", wide_key).flatten(1),
            attention_impl.for_truncating_cache(self, "v", wide_value).flatten(1),
            output_dtype=output_dtype,
        )
        narrow = self.store.after(out.view(tokens, self.num_heads, self.head_size), size)
        return narrow.reshape(tokens, self.num_heads * size)


def swap(language_model: nn.Module, vllm_config: VllmConfig, era: EraConfig) -> BiasBuffer:
    """Replace every attention layer of the language model; call at the end of a model's __init__.

    Args:
        era: Says which store, and gamma.

    Returns:
        The buffer that one step's biases are written to, shared by all layers.

    Raises:
        UnsupportedError: a layer that cannot be widened exactly.
        ConfigError: gamma is not for this model's layers and heads.
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
    dtype = torch.get_default_dtype()
    store = make_store(era.bias_store, era.bias_columns, stored_dtype(first), dtype)
    width = _widened(first, store) - first.head_size
    scheduler = vllm_config.scheduler_config
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    rows = max(scheduler.max_num_batched_tokens, graphs)
    scale, gamma = attention_impl.scale_of(first), _exponents(era, owners, vllm_config)
    buffer = BiasBuffer(rows, width, store, scale, dtype, gamma)
    for index, owner in enumerate(owners):
        stock: Attention = owner.attn
        _check(stock, first, store)
        static_forward_context.release(vllm_config, stock)
        owner.attn = RectifiedAttention(stock, store, buffer, index, vllm_config)
        if lost := attention_impl.differences(stock, owner.attn):
            raise UnsupportedError(
                f"{stock.layer_name}: a wider layer could not be built with the same "
                f"{', '.join(lost)}; only vLLM's plain decoder Attention can carry a bias"
            )
    attention_impl.announce_head_size(vllm_config, first.head_size + width)
    return buffer


def heads_of_rank(total: int, size: int, rank: int) -> slice:
    """Return a rank's KV heads: its share, or its copy of one where ranks outnumber heads."""
    first = rank * total // size
    return slice(first, first + max(1, total // size))


def _exponents(
    era: EraConfig, owners: list[nn.Module], vllm_config: VllmConfig
) -> Float32[Tensor, "l h"] | None:
    """Return the exponents of this rank's KV heads."""
    total = vllm_config.model_config.get_total_num_kv_heads()
    if (table := era.exponents(len(owners), total)) is None:
        return None
    size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    exponents = torch.tensor(table, dtype=torch.float32)[:, heads_of_rank(total, size, rank)]
    if odd := [owner.attn for owner in owners if owner.attn.num_kv_heads != exponents.shape[1]]:
        raise UnsupportedError(
            f"gamma: {odd[0].layer_name} has {odd[0].num_kv_heads} KV heads on rank {rank} of "
            f"{size}, expected {exponents.shape[1]} of the model's {total}; leave gamma out"
        )
    return exponents.contiguous()


def stored_dtype(layer: Attention) -> torch.dtype:
    """Return the number format of the layer's KV cache (vLLM keeps fp8 as bytes)."""
    if layer.kv_cache_dtype in ("fp8", "fp8_e4m3"):
        return torch.float8_e4m3fn
    return layer.kv_cache_torch_dtype


def _widened(stock: Attention, store: BiasStore) -> int:
    return widened_head_size(stock.head_size, stock.kv_cache_dtype, stock.attn_backend, store)


def widened_head_size(
    stock: int, cache_dtype: str, backend: type[attention_impl.AttentionBackend], store: BiasStore
) -> int:
    """Return the smallest head size that holds the store's columns and that the platform takes.

    On a GPU a multiple of 8, for an fp8 cache of 16 (FlashAttention 3 on Hopper), and vLLM selects
    the backend anew for it. On a CPU one of a fixed list; its fp8 cache wants multiples of 32
    although no ``supports_*`` call says so.
    """
    needed = stock + store.extra_columns
    fp8 = cache_dtype.startswith("fp8")
    if not current_platform.is_cpu():
        step = 16 if fp8 else 8
        return -(-needed // step) * step
    step = 32 if fp8 else 16
    sizes = backend.get_supported_head_sizes()
    fitting = [size for size in sizes if size >= needed and size % step == 0]
    if not fitting:
        raise UnsupportedError(
            f"language model: head size {stock} + {store.extra_columns} columns; the CPU backend "
            f"takes {sizes}; choose a model with a smaller head size"
        )
    return min(fitting)


def _check(stock: Attention, first: Attention, store: BiasStore) -> None:
    name = stock.layer_name
    if type(stock) is not Attention or stock.attn_type != attention_impl.DECODER:
        raise UnsupportedError(
            f"{name}: got {type(stock).__name__} ({stock.attn_type}); only vLLM's plain decoder "
            "Attention can carry a bias"
        )
    if stock.sliding_window is not None:
        raise UnsupportedError(
            f"{name}: a sliding window of {stock.sliding_window} tokens, which would count tokens "
            "that are kept, not places in the image; choose a model with full attention"
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
    if (
        stored_dtype(stock) == torch.float8_e4m3fn
        and not store.limits.flushed
        and cpu_attention.fp8_kernel(torch.get_default_dtype()) in cpu_attention.FLUSHING
    ):  # of a checkpoint's kv_cache_scheme: ``refusals`` sees only what the config says
        raise UnsupportedError(
            f"{name}: an fp8 KV cache on a CPU with AMX, whose kernel takes small sums for 0 that "
            "this bias store needs; choose bias_store key_columns, or a cache that is not fp8"
        )
    if attention_impl.soft_cap_of(stock) is not None and not store.limits.soft_cap:
        raise UnsupportedError(
            f"{name}: attention scores are soft-capped, and a bias in the key would be capped with "
            "them; choose bias_store value_column"
        )
    if attention_impl.sinks_of(stock) is not None and not store.limits.sinks:
        raise UnsupportedError(
            f"{name}: attention sinks, which the division by the mass would take away; choose "
            "bias_store key_columns"
        )
    if attention_impl.scale_of(stock) != attention_impl.scale_of(first):
        raise UnsupportedError(
            f"{name}: softmax scale {attention_impl.scale_of(stock)} differs from the first "
            f"layer's {attention_impl.scale_of(first)}; layers of one scale are needed"
        )
