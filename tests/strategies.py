"""Visual tokens for the tests: generic ones, and every kind of awkward one.

Hypothesis draws sizes, kinds and a seed; the numbers come from a seeded generator.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from era_vllm.types import Signal, VisualTokens

Array = NDArray[np.float64]
Draw = st.DrawFn


def _twins(rng: np.random.Generator, n: int, d: int) -> Array:
    return rng.normal(size=(n, d))[rng.integers(0, (n + 1) // 2, n)]


def _outliers(rng: np.random.Generator, n: int, d: int) -> Array:
    return rng.normal(size=(n, d)) * np.where(rng.random((n, 1)) < 0.2, 1e3, 1.0)


FEATURES: Final[dict[str, Callable[[np.random.Generator, int, int], Array]]] = {
    "generic": lambda rng, n, d: rng.normal(size=(n, d)),
    "twins": _twins,
    "outliers": _outliers,
    "lattice": lambda rng, n, d: rng.integers(-1, 2, (n, d)).astype(np.float64),
    "same": lambda rng, n, d: np.tile(rng.normal(size=(1, d)), (n, 1)),
    "zero": lambda rng, n, d: np.zeros((n, d)),
}


def _peaked(rng: np.random.Generator, heads: int, n: int) -> Array:
    scores = np.exp(2 * rng.normal(size=(heads, n)))
    return scores / scores.sum(axis=1, keepdims=True)


ATTENTION: Final[dict[str, Callable[[np.random.Generator, int, int], Array]]] = {
    "peaked": _peaked,
    "partly zero": lambda rng, h, n: _peaked(rng, h, n) * (rng.random(n) < 0.6),
    "same in all heads": lambda rng, h, n: np.tile(_peaked(rng, 1, n), (h, 1)),
    "flat": lambda rng, h, n: np.full((h, n), 1.0 / n),
    "zero": lambda rng, h, n: np.zeros((h, n)),
}


def build(
    seed: int,
    grid: tuple[int, int],
    d: int = 7,
    heads: int = 3,
    kinds: tuple[tuple[str, str], ...] = (("generic", "peaked"),),
    dtype: torch.dtype = torch.float32,
) -> VisualTokens:
    """Return one segment for each (features, attention) pair of ``kinds``, with every signal."""
    rng = np.random.default_rng(seed)
    n = grid[0] * grid[1]
    embeds = np.stack([FEATURES[kind](rng, n, d) for kind, _ in kinds])
    attention = np.stack([ATTENTION[kind](rng, heads, n) for _, kind in kinds])
    signals = {
        Signal.ENCODER_ATTENTION: torch.from_numpy(attention).float(),
        Signal.ENCODER_SCORES: torch.from_numpy(rng.normal(size=attention.shape)).float(),
        Signal.PIXEL_HASH: torch.from_numpy(rng.integers(-(2**62), 2**62, len(kinds))),
    }
    of_class = np.stack([ATTENTION[kind](rng, heads, n) for _, kind in kinds])
    signals[Signal.CLASS_ATTENTION] = torch.from_numpy(of_class).float()
    for signal, own, size in (
        (Signal.ENCODER_KEYS, heads, 4),
        (Signal.LANGUAGE_QUERIES, 4, 5),
    ):
        rows = np.stack([FEATURES[kind](rng, n, own * size) for kind, _ in kinds])
        by_head = rows.reshape(len(kinds), n, own, size).transpose(0, 2, 3, 1)
        signals[signal] = torch.from_numpy(by_head.copy()).float()
    relevance = np.stack([ATTENTION[kind](rng, 1, n) for _, kind in kinds])
    signals[Signal.RELEVANCE] = torch.from_numpy(relevance).float()
    return VisualTokens(
        embeds=torch.from_numpy(embeds).to(dtype),
        grid=grid,
        signals=signals,
    )


def with_signal(tokens: VisualTokens, signal: Signal, value: torch.Tensor) -> VisualTokens:
    """Return tokens with another value of one signal."""
    return replace(tokens, signals={**tokens.signals, signal: value})


def without(tokens: VisualTokens, *signals: Signal) -> VisualTokens:
    """Return tokens that lack some signals."""
    left = {signal: x for signal, x in tokens.signals.items() if signal not in signals}
    return replace(tokens, signals=left)


def convert(tokens: VisualTokens, change: Callable[[torch.Tensor], torch.Tensor]) -> VisualTokens:
    """Return tokens with the same change made to the embeddings and to every signal."""
    signals = {signal: change(x) for signal, x in tokens.signals.items()}
    return VisualTokens(change(tokens.embeds), tokens.grid, signals)


def segment(tokens: VisualTokens, index: int, *, copy: bool = True) -> VisualTokens:
    """Return one segment alone: copied, or as a view into the batch's memory."""
    alone = convert(tokens, lambda x: x[index : index + 1])
    return convert(alone, torch.clone) if copy else alone


def gather(tokens: VisualTokens, order: Sequence[int]) -> VisualTokens:
    """Return a batch of these segments in another order, some perhaps twice."""
    return convert(tokens, lambda x: x[list(order)])


@st.composite
def generic(draw: Draw, *, least: int = 2) -> tuple[VisualTokens, int]:
    """One segment without planned ties, and a number of anchors below n."""
    grid = draw(_grids(least))
    tokens = build(draw(_SEEDS), grid, d=draw(st.integers(2, 20)), heads=draw(st.integers(2, 6)))
    return tokens, draw(st.integers(1, tokens.n - 1))


@st.composite
def batches(draw: Draw, *, segments: int = 5, least: int = 2) -> tuple[VisualTokens, int]:
    """Two to ``segments`` segments of any kind, and a number of anchors below n."""
    grid = draw(_grids(least))
    kind = st.tuples(st.sampled_from(sorted(FEATURES)), st.sampled_from(sorted(ATTENTION)))
    tokens = build(
        draw(_SEEDS),
        grid,
        d=draw(st.integers(1, 20)),
        heads=draw(st.integers(1, 5)),
        kinds=tuple(draw(st.lists(kind, min_size=2, max_size=segments))),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
    )
    return tokens, draw(st.integers(1, tokens.n - 1))


@st.composite
def repeats(draw: Draw) -> tuple[VisualTokens, torch.Tensor, int]:
    """Segments whose tokens are copies of few; the copied token's index; a number of anchors."""
    tokens = build(
        draw(_SEEDS), (5, 7), d=draw(st.integers(2, 20)), kinds=(("generic", "peaked"),) * 2
    )
    bases = draw(st.integers(1, 20))
    source = torch.tensor(draw(st.lists(st.integers(0, bases - 1), min_size=24, max_size=24)))
    signals = {
        signal: x[..., source].contiguous() if x.is_floating_point() else x
        for signal, x in tokens.signals.items()
    }
    copies = VisualTokens(tokens.embeds[:, source], (4, 6), signals)
    return copies, source, draw(st.integers(1, 23))


_SEEDS = st.integers(0, 2**32 - 1)


def _grids(least: int) -> st.SearchStrategy[tuple[int, int]]:
    sizes = st.tuples(st.integers(1, 7), st.integers(1, 11))
    return sizes.filter(lambda grid: grid[0] * grid[1] >= least)
