"""What a store says of kernels that flush, under vLLM's AMX arithmetic, emulated step by step.

The bar is what a stock layer loses in the same arithmetic: the same tokens, no columns, the scales
as calibrated. Products are TDPBF16PS's: bfloat16 operands, two float32 chains (even and odd) over
32 tokens, each sum below the smallest normal number taken for 0; an fp8 number is 2^-120 times
itself there, so the threshold is 2^-6 of fp8's units. The engine's own tests run the kernel itself
where a CPU has it (``engine/test_precision.py``).
"""

import math

import pytest
import torch
from torch import Tensor

from era_vllm.attention.bias_store import STORES, make_store
from era_vllm.attention.reference import rectified_attention
from tests.contracts.test_bias_stores import (
    FP8,
    HEADS,
    KV_HEADS,
    SCALE,
    SIZE,
    STOCK_FACTOR,
    WIDTH,
    tokens,
)

COUNT = 64
SMALLEST = 2.0**-6
KEY, VALUE = 9.9, 7.5
"""Largest of each; about the sample model's."""
SCALES = [(KEY / 448, VALUE / 448), (1.0, 1.0)]
"""Of keys and values: calibrated, and what vLLM takes where none was."""


def flushed(x: Tensor) -> Tensor:
    """Take what a float32 unit takes for 0 to be 0."""
    return torch.where(x.abs() < SMALLEST, 0.0, x)


def in_units(x: Tensor, scale: float) -> Tensor:
    """Return what an fp8 cache holds of x, in units of its scale."""
    return (x / scale).clamp(-448, 448).to(FP8).float()


def product(a: Tensor, b: Tensor, flush: bool) -> Tensor:
    """Return a [m, k] b [k, n], b in fp8's units, as the AMX kernel adds it up."""
    keep = flushed if flush else lambda x: x
    a, b = a.bfloat16().double(), keep(b).double()
    out = torch.zeros(len(a), b.shape[1])
    for tile in range(0, a.shape[1], 32):
        chains = torch.zeros(2, *out.shape)
        for k in range(tile, tile + 32):
            step = chains[k % 2].double() + a[:, k, None] * b[k]
            chains[k % 2] = keep(step.float())
        out = keep(out + keep(chains[0] + chains[1]))
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, ks: float, vs: float, flush: bool, bias: Tensor | float = 0.0
) -> Tensor:
    """Return attention over an fp8 cache with these scales, with a bias that no cache rounds."""
    heads = []
    for head in range(HEADS):
        own = head * KV_HEADS // HEADS
        scores = product(q[:, head], in_units(k[:, own], ks).T, flush) * (ks * SCALE) + bias
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        heads.append(product(p, in_units(v[:, own], vs), flush) * vs / p.sum(-1, keepdim=True))
    return torch.stack(heads, 1)


def errors(name: str, seed: int, ks: float, vs: float, heaviest: float, flush: bool = True):
    """Return two errors of the output: with the store, and of a stock layer given the bias exactly.

    Args:
        heaviest: A quarter of the tokens stand for up to so many; 1 = text alone.
    """
    q, k, v = tokens(seed, COUNT, key=KEY, value=VALUE)
    q = q / q.abs().max() / k.abs().max() * SIZE**0.5  # scores of a few units
    bias = torch.zeros(COUNT)
    bias[::4] = torch.linspace(0, math.log(heaviest), len(bias[::4]))
    store = make_store(name, None, FP8, torch.float32)
    columns = store.columns(bias, WIDTH, SCALE, torch.float32)[:, None]
    wide_q = store.before(q, k[:3], v[:3], columns[:3])[0]
    _, wide_k, wide_v = store.before(k.repeat(1, 2, 1), k, v, columns)
    fitted = store.cache_scale("k", ks), store.cache_scale("v", vs)
    ours = store.after(attend(wide_q, wide_k, wide_v, *fitted, flush), SIZE)
    stock = attend(q, k, v, ks, vs, flush, bias)
    exact = rectified_attention(q, k, v, bias, SCALE, causal=False)
    return [(found - exact).abs().mean().item() for found in (ours, stock)]


def mean_errors(*args: object, **how: object) -> Tensor:
    """Return the errors' means over seeds."""
    return torch.tensor([errors(args[0], seed, *args[1:], **how) for seed in range(8)]).mean(0)


@pytest.mark.parametrize("name", [name for name in STORES if STORES[name].limits.flushed])
@pytest.mark.parametrize("heaviest", [1, 5, 50, 500])
@pytest.mark.parametrize("scales", SCALES)
def test_a_store_that_bears_it_is_as_close_as_stock(
    name: str, heaviest: float, scales: tuple[float, float]
) -> None:
    ours, stock = mean_errors(name, *scales, heaviest)
    assert ours <= STOCK_FACTOR * stock


@pytest.mark.parametrize("name", [name for name in STORES if not STORES[name].limits.flushed])
def test_one_that_does_not_is_off_for_text_by_the_flushing_alone(name: str) -> None:
    ours, stock = mean_errors(name, *SCALES[0], 1)
    unflushed, _ = mean_errors(name, *SCALES[0], 1, flush=False)
    assert unflushed <= STOCK_FACTOR * stock < ours
