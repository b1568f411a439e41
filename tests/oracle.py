"""The method once more, written from its description: numpy, float64, one segment, plain loops.

Shares no line with era_vllm. Every function also returns the smallest margin by which a choice was
made, so that a test can set near ties aside, where float32 may rightly choose otherwise.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """Anchors in ascending order and the smallest margin of a choice."""

    anchors: Index
    margin: float


@dataclass(frozen=True)
class Recycled:
    """Merged tokens, the mass b of each, each token's row, and the smallest margin."""

    embeds: Array
    mass: Array
    assignment: Index
    margin: float


def head_entropy(attention: Array) -> Array:
    """Normalised entropy over heads of each token; attention is [heads, tokens]."""
    heads, count = attention.shape
    mass = attention.sum(axis=0)
    entropy = np.ones(count)
    if heads == 1:
        return entropy
    for token in range(count):
        if mass[token] <= 1e-12 or mass[token] < 1e-3 * np.median(mass):
            continue
        total = 0.0
        for share in attention[:, token] / mass[token]:
            if share > 0:
                total -= share * np.log(share)
        entropy[token] = min(max(total / np.log(heads), 0.0), 1.0)
    return entropy


def select(embeds: Array, attention: Array, count: int, lam: float, alpha: float) -> Selection:
    """Entropy-penalised farthest-first search in the dual view."""
    entropy = head_entropy(attention)
    spread = entropy.max() - entropy.min()
    penalty = (entropy - entropy.min()) / spread if spread > 1e-5 else np.zeros_like(entropy)
    view = np.concatenate(
        [np.sqrt(1 - lam) * _unit(embeds), np.sqrt(lam) * _unit(_profile(attention))], axis=1
    )
    start, margin = _best(-penalty, [])
    margins = [margin] if penalty.any() else []  # where all are equal, the first is meant
    chosen = [start]
    while len(chosen) < count:
        distance = (1.0 - view @ view[chosen].T).min(axis=1)
        best, margin = _best(distance - alpha * penalty, chosen)
        chosen.append(best)
        margins.append(margin)
    return Selection(np.array(sorted(chosen)), min(margins, default=np.inf))


def recycle(embeds: Array, anchors: Index, entropy: Array, rho: float) -> Recycled:
    """Join pruned tokens to their most similar anchor; b = 1 + sum of rho s / mean(s).

    Where mean(s) is below 1e-3, the part mean(s) / 1e-3 of that, and the rest of rho evenly.
    """
    rows = _unit(embeds)
    chosen = [int(anchor) for anchor in anchors]
    assignment = np.zeros(len(rows), dtype=np.int64)
    margins = [np.inf]
    pruned = [token for token in range(len(rows)) if token not in chosen]
    for row, anchor in enumerate(chosen):
        assignment[anchor] = row
    for token in pruned:
        assignment[token], margin = _best(rows[chosen] @ rows[token], [])
        margins.append(margin)
    saliency = 1.0 - entropy
    mean = float(np.mean([saliency[token] for token in pruned])) if pruned else 0.0
    part = min(1.0, mean / 1e-3)
    mass = np.ones(len(chosen))
    for token in pruned:
        own = saliency[token] / mean if mean > 0 else 1.0
        mass[assignment[token]] += rho * (part * own + (1.0 - part))
    merged = np.stack([embeds[assignment == row].mean(axis=0) for row in range(len(chosen))])
    return Recycled(merged, mass, assignment, min(margins))


def greedy_log_det(kernel: Array, first: int, count: int) -> Selection:
    """Add the token that makes log det of the chosen submatrix largest; by determinants alone."""
    chosen, margins = [first], [np.inf]
    while len(chosen) < count:
        volume = np.full(len(kernel), -np.inf)
        for token in range(len(kernel)):
            if token not in chosen:
                subset = [*chosen, token]
                volume[token] = np.linalg.slogdet(kernel[np.ix_(subset, subset)])[1]
        best, margin = _best(volume, chosen)
        chosen.append(best)
        margins.append(margin)
    return Selection(np.array(sorted(chosen)), min(margins))


def attention(query: Array, key: Array, value: Array, bias: Array, scale: float) -> Array:
    """softmax(scale q.k + bias) v of one head, every query seeing every key."""
    out = np.zeros((len(query), value.shape[1]))
    for step, row in enumerate(query):
        weight = np.exp(scale * (key @ row) + bias)
        out[step] = weight @ value / weight.sum()
    return out


def _best(score: Array, taken: list[int]) -> tuple[int, float]:
    """Lowest index of the largest score outside ``taken``, and its lead over the next one."""
    free = [token for token in range(len(score)) if token not in taken]
    best = max(free, key=lambda token: (score[token], -token))
    rest = [float(score[best] - score[token]) for token in free if token != best]
    return best, min(rest, default=np.inf)


def _profile(attention: Array) -> Array:
    mass = attention.sum(axis=0)
    even = np.full(attention.T.shape, 1.0 / len(attention))
    safe = np.where(mass > 1e-12, mass, 1.0)
    return np.where((mass > 1e-12)[:, None], attention.T / safe[:, None], even)


def _unit(rows: Array) -> Array:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)
