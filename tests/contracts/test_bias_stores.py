"""Laws of every bias store, with a cache of each number format emulated around dense attention."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from era_vllm.attention.bias_store import STORES, make_store
from era_vllm.attention.reference import rectified_attention
from era_vllm.contracts import BiasStore
from era_vllm.errors import ConfigError

FP8 = torch.float8_e4m3fn
HEADS, KV_HEADS, SIZE, WIDTH = 4, 2, 64, 32
SCALE = SIZE**-0.5
every_store = pytest.mark.parametrize("name", STORES)
every_cache = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, FP8], ids=str
)
every_model = pytest.mark.parametrize(
    "model", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: f"model-{dtype}"
)
SCALES = st.floats(1e-4, 0.125)  # of keys of .05 to 56, as calibrations give them
LARGEST = 500.0
STOCK_FACTOR = 1.5


def stored(x: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return what a cache gives back: rounded, and saturated as vLLM's fp8 cache write does."""
    if dtype != FP8:
        return x.to(dtype).float()
    return (x.float() / scale).clamp(-448, 448).to(FP8).float() * scale


def tokens(seed: int, count: int = 24, key: float = 1.0, value: float = 1.0) -> list[Tensor]:
    """Return random query, key, value whose largest keys and values are the given."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (3, HEADS), (count, KV_HEADS), (count, KV_HEADS)
    q, k, v = (torch.randn(*shape, SIZE, generator=generator) for shape in shapes)
    return [q, k / k.abs().max() * key, v / v.abs().max() * value]


def columns_of(store: BiasStore, bias: Tensor, model: torch.dtype = torch.float32) -> Tensor:
    """Return columns as they come to a cache: out of the model's dtype; the rest stays float32."""
    columns = store.columns(bias, WIDTH, SCALE, model)
    assert columns.dtype == model
    return (columns if columns.ndim == 3 else columns[:, None]).float()


def attend(
    store: BiasStore,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scales: tuple[float, float],
    model: torch.dtype = torch.float32,
) -> Tensor:
    """Return the attention output through a store and a cache of its number format."""
    columns = columns_of(store, bias, model)
    # The queries are fewer than the keys; a store treats each row alone.
    wide_q = store.before(q, k[:3], v[:3], columns[:3])[0]
    _, wide_k, wide_v = store.before(k.repeat(1, 2, 1), k, v, columns)
    wide_k = stored(wide_k, store.kv_dtype, scales[0])
    wide_v = stored(wide_v, store.kv_dtype, scales[1])
    zeros = torch.zeros(k.shape[0])
    out = rectified_attention(wide_q, wide_k, wide_v, zeros, SCALE, causal=False)
    return store.after(out, SIZE)


@every_store
@given(seed=st.integers(0, 2**32 - 1), per_head=st.booleans())
def test_is_rectified_attention(name: str, seed: int, per_head: bool) -> None:
    q, k, v = tokens(seed, key=4.0)
    bias = torch.rand(24, *([KV_HEADS] if per_head else [])) * math.log(LARGEST)
    expected = rectified_attention(q, k, v, bias, SCALE, causal=False)
    found = attend(make_store(name, None, torch.float32, torch.float32), q, k, v, bias, (1.0, 1.0))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    without = rectified_attention(q, k, v, torch.zeros(24), SCALE, causal=False)
    assert (without - expected).abs().max() > 1e-3


@every_store
@every_cache
@every_model
def test_text_holds_0_and_keeps_its_values(
    name: str, dtype: torch.dtype, model: torch.dtype
) -> None:
    store = make_store(name, None, dtype, model)
    q, k, v = tokens(0)
    columns = columns_of(store, torch.zeros(24), model)
    _, wide_k, wide_v = store.before(k.repeat(1, 2, 1), k, v, columns)
    assert torch.equal(wide_k[..., :SIZE], k) and torch.equal(wide_v[..., :SIZE], v)
    rows = wide_k if store.scaled == "k" else wide_v
    assert not store.read(rows, SIZE, SCALE).any()


ERRORS = {
    "key_columns": {FP8: 0.03, torch.bfloat16: 1e-4, torch.float16: 1e-5, torch.float32: 2e-6},
    "value_column": {FP8: 0.0625, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6},
}
"""Of a bias up to ln 500, by the coarser of the two number formats, coarsest first."""


@every_store
@every_cache
@every_model
@given(scale=st.floats(1e-4, 0.9))
def test_bias_comes_back(name: str, dtype: torch.dtype, model: torch.dtype, scale: float) -> None:
    """Whatever scale an fp8 cache was calibrated to: a mass is rounded once."""
    store = make_store(name, None, dtype, model)
    error = next(error for coarser, error in ERRORS[name].items() if coarser in (dtype, model))
    bias = torch.linspace(0, math.log(LARGEST), 200)
    scale = store.cache_scale(store.scaled, scale) if dtype == FP8 else 1.0
    columns = columns_of(store, bias, model)
    _, k, v = tokens(0, 200)
    _, wide_k, wide_v = store.before(k.repeat(1, 2, 1), k, v, columns)
    rows = stored(wide_k if store.scaled == "k" else wide_v, dtype, scale)
    assert (store.read(rows, SIZE, SCALE) - bias[:, None]).abs().max() < error


@every_store
@every_cache
@every_model
@pytest.mark.parametrize("largest", [6.0, 90.0, 2e4])
def test_the_cache_holds_what_the_model_writes(
    name: str, dtype: torch.dtype, model: torch.dtype, largest: float
) -> None:
    """No cast on the way rounds a column, or makes it infinite, whatever is asked for."""
    store = make_store(name, None, dtype, model)
    bias = largest * torch.linspace(0, 1, 500) ** 4
    columns = columns_of(store, bias, model)
    assert columns.isfinite().all()
    assert torch.equal(stored(columns, dtype, 8.0 if store.scaled == "v" else 1.0), columns)


@every_store
@given(seed=st.integers(0, 2**32 - 1), key=SCALES, value=SCALES)
def test_fp8_holds_clusters_of_500_at_any_calibrated_scale(
    name: str, seed: int, key: float, value: float
) -> None:
    """Nothing saturates, and the output is about as close as a stock cache's, given the bias."""
    store = make_store(name, None, FP8, torch.float32)
    q, k, v = tokens(seed, key=448 * key, value=448 * value)
    q = q / q.abs().max() / k.abs().max() * SIZE**0.5  # scores of a few units, whatever the keys
    bias = torch.zeros(24)
    bias[::4] = math.log(LARGEST)
    bias[v.abs().amax((1, 2)).argmax()] = math.log(LARGEST)
    scales = store.cache_scale("k", key), store.cache_scale("v", value)
    _, wide_k, wide_v = store.before(k.repeat(1, 2, 1), k, v, columns_of(store, bias))
    assert wide_k.abs().max() <= 448 * scales[0]
    assert wide_v.abs().max() <= 448 * scales[1]
    found = attend(store, q, k, v, bias, scales)
    expected = rectified_attention(q, k, v, bias, SCALE, causal=False)
    stock_k, stock_v = stored(k, FP8, key), stored(v, FP8, value)
    stock = rectified_attention(q, stock_k, stock_v, bias, SCALE, causal=False)
    assert (found - expected).abs().mean() <= STOCK_FACTOR * (stock - expected).abs().mean()


@every_store
@every_cache
@every_model
@pytest.mark.parametrize("bias", [9.0, 80.0])
def test_more_than_fits_saturates_and_is_never_nan(
    name: str, dtype: torch.dtype, model: torch.dtype, bias: float
) -> None:
    """A mass of 8,000 or 5e34 (an exponent far above 1), values of 30: wrong at most in size."""
    store = make_store(name, None, dtype, model)
    q, k, v = tokens(0, key=30.0, value=30.0)
    scales = store.cache_scale("k", 1.0), store.cache_scale("v", 1.0)
    heavy = torch.zeros(24)
    heavy[::3] = bias
    found = attend(store, q, k, v, heavy, scales, model)
    assert found.isfinite().all()
    assert found.abs().max() <= 31


@every_store
@given(scale=st.floats(1e-4, 8))
def test_scales_survive_a_second_load_and_hold_the_query_constant(name: str, scale: float) -> None:
    store = make_store(name, None, FP8, torch.float32)
    for tensor in ("q", "k", "v"):
        fitted = store.cache_scale(tensor, scale)
        assert fitted == scale or math.frexp(fitted)[0] == 0.5  # untouched, or a power of two
    q, k, v = tokens(0)
    columns = columns_of(store, torch.ones(24))
    constant = store.before(k.repeat(1, 2, 1), k, v, columns)[0][..., SIZE:]
    assert torch.equal(stored(constant, FP8, store.cache_scale("q", scale)), constant)


def test_what_a_store_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'key_columns'"):
        make_store("key_column", None, torch.float32, torch.float32)
    with pytest.raises(ConfigError, match="got a KV cache of torch.uint8, allowed: bfloat16, "):
        make_store("key_columns", None, torch.uint8, torch.float32)
    with pytest.raises(ConfigError, match="got 2, allowed for value_column: 1"):
        make_store("value_column", 2, torch.float32, torch.float32)
