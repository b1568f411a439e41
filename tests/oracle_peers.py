"""The peers once more, as ``oracle`` has the method: numpy, float64, one segment, plain loops.

Shares no line with era_vllm. Each selection tells the smallest margin by which a choice was made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.oracle import Array, Index, Selection


@dataclass(frozen=True)
class Joined:
    """What each anchor becomes, which anchor each token joined (-1: none), and the margin."""

    embeds: Array
    assignment: Index
    margin: float


def voted(embeds: Array, attention: Array, count: int, relevance: Array | None = None) -> Selection:
    """MFPruner: lists, of which two or all have to name a token, then by the sum of scores.

    Without a relevance, or where it is 0 everywhere, two lists.
    """
    cosine, n = _cosines(embeds), len(embeds)
    unlike = np.array([1.0 - (cosine[i].sum() - cosine[i, i]) / n for i in range(n)])
    lists = [_stretch(attention.mean(axis=0)), _stretch(unlike)]
    if relevance is not None and relevance.any():
        lists.append(_stretch(relevance))
    named = [_first(score, count) for score in lists]
    margins = [_gap(score, count) for score in lists]
    total = np.sum(lists, axis=0)
    votes = [sum(token in one for one in named) for token in range(n)]
    chosen: list[int] = []
    for number in (3, 2, None):
        left = [
            token
            for token in range(n)
            if token not in chosen and (votes[token] == number or number is None)
        ]
        room = count - len(chosen)
        margins.append(_gap(total[left], room))
        chosen += sorted(left, key=lambda token: (-total[token], token))[:room]
    return Selection(np.array(sorted(chosen)), min(margins))


def conditioned(embeds: Array, relevance: Array, count: int, theta: float) -> Selection:
    """CDPruner: stretched relevance as quality, the most relevant token first."""
    cosine = _cosines(embeds)
    part = _stretch(relevance)
    strength = np.inf if theta == 1 else theta / (2 * (1 - theta))
    quality = part + 1e-6 if theta == 1 else np.exp(strength * part)
    if not part.any():
        quality = np.ones_like(quality)
    closeness = part if part.any() and theta > 0 else cosine.mean(axis=1)
    found = weighted(cosine + 1e-3 * np.eye(len(cosine)), quality, int(closeness.argmax()), count)
    return Selection(found.anchors, min(found.margin, _gap(closeness, 1)))


def relevant(embeds: Array, relevance: Array, count: int, ridge: float, beta: float) -> Selection:
    """The dpp policy with a quality: relevance as a part of the largest, to a power."""
    cosine = _cosines(embeds)
    closeness = cosine.mean(axis=1)
    quality = np.ones(len(cosine))
    if relevance.any():
        quality = np.maximum(relevance / relevance.max(), 1e-6) ** beta
    kernel = cosine + ridge * np.eye(len(cosine))
    found = weighted(kernel, quality, int(closeness.argmax()), count)
    return Selection(found.anchors, min(found.margin, _gap(closeness, 1)))


def weighted(kernel: Array, quality: Array, first: int, count: int) -> Selection:
    """Add the token that makes the determinant of q_i L_ij q_j largest; by determinants alone.

    The margin is in what the best token adds to that of L, of which float32 keeps a millionth.
    """
    whole = quality[:, None] * kernel * quality[None, :]
    chosen, margins = [first], [np.inf]
    volume = 2 * np.log(quality[first]) + np.log(kernel[first, first])
    while len(chosen) < count:
        free = [token for token in range(len(kernel)) if token not in chosen]
        subsets = [[*chosen, token] for token in free]
        volumes = np.array([np.linalg.slogdet(whole[np.ix_(own, own)])[1] for own in subsets])
        best = int(volumes.argmax())
        lead = 1.0 - np.exp(-_gap(volumes, 1))
        margins.append(lead * np.exp(volumes[best] - volume) / quality[free[best]] ** 2)
        chosen.append(free[best])
        volume = volumes[best]
    return Selection(np.array(sorted(chosen)), min(margins))


def entropies(queries: Array, *, trace_norm: bool) -> Array:
    """EntropyPrune's score of each token, from singular values; queries are [heads, size, n]."""
    heads, _, n = queries.shape
    scores = np.zeros(n)
    for token in range(n):
        rows = queries[:, :, token] - queries[:, :, token].mean(axis=0)
        spectrum = np.linalg.svd(rows, compute_uv=False) ** 2 / heads
        if trace_norm and spectrum.sum() > 0:
            spectrum = spectrum / spectrum.sum()
        for value in spectrum[spectrum > 1e-10]:
            scores[token] -= value * np.log(value) / np.log(heads)
    return scores


def most_entropic(queries: Array, count: int, *, trace_norm: bool) -> Selection:
    """Return the tokens of highest score."""
    scores = entropies(queries, trace_norm=trace_norm)
    return Selection(np.array(sorted(_first(scores, count))), _gap(scores, count))


def max_min(embeds: Array, count: int) -> Selection:
    """DivPrune: the token with the farthest nearest neighbour, then the farthest from all taken."""
    distance, n = 1.0 - _cosines(embeds), len(embeds)
    lonely = np.array([min(distance[i, j] for j in range(n) if j != i) for i in range(n)])
    chosen, margins = [int(lonely.argmax())], [_gap(lonely, 1)]
    while len(chosen) < count:
        free = [token for token in range(n) if token not in chosen]
        nearest = np.array([min(distance[token, other] for other in chosen) for token in free])
        chosen.append(free[int(nearest.argmax())])
        margins.append(_gap(nearest, 1))
    return Selection(np.array(sorted(chosen)), min(margins))


def distinct(embeds: Array, attention: Array, count: int, important: float) -> Selection:
    """VisPruner: by attention, then rounds that take eight of the closest matches out."""
    score = _stretch(attention.mean(axis=0))
    order = _first(score, len(score))
    margins = [_closest(score)]
    cosine = _cosines(embeds)
    by_attention = math.ceil(count * important)
    chosen, left = order[:by_attention], order[by_attention:]
    while count > by_attention and len(left) > count - by_attention:
        held, against = left[::2], left[1::2]
        match = np.array([max(cosine[token, other] for other in against) for token in held])
        margins.append(_closest(match))
        ranking = _first(match, len(match))
        stay = [held[place] for place in ranking[min(8, len(left) - count + by_attention) :]]
        left = [*stay, *against]
    if count > by_attention:
        chosen = [*chosen, *left]
    return Selection(np.array(sorted(chosen)), min(margins))


def dominant_and_contextual(attention: Array, count: int, share: float) -> Selection:
    """VisionZip's anchors."""
    score = _stretch(attention.mean(axis=0))
    number = max(1, min(round(share * count), count - 1))
    chosen = _first(score, number)
    left = [token for token in range(len(score)) if token not in chosen]
    if contextual := count - number:
        chosen = [*chosen, *left[:: len(left) // contextual][:contextual]]
    return Selection(np.array(sorted(chosen)), _gap(score, number))


def zipped(embeds: Array, attention: Array, keys: Array, anchors: Index, share: float) -> Joined:
    """VisionZip's merging; keys are [heads, size, n]."""
    score, chosen = attention.mean(axis=0), [int(anchor) for anchor in anchors]
    number = max(1, min(round(share * len(chosen)), len(chosen) - 1))
    dominant = sorted(chosen, key=lambda token: (-score[token], token))[:number]
    contextual = [token for token in chosen if token not in dominant]
    cosine, margins = _cosines(keys.mean(axis=0).T), [np.inf]
    assignment = np.full(len(embeds), -1)
    members: dict[int, list[int]] = {token: [] for token in contextual}
    for token in range(len(embeds)):
        if token in chosen:
            assignment[token] = chosen.index(token)
        elif contextual:
            best = max(contextual, key=lambda other: (cosine[token, other], -other))
            margins.append(_gap(cosine[token, contextual], 1))
            assignment[token] = chosen.index(best)
            members[best].append(token)
    merged = embeds[chosen].copy()
    for target, joined in members.items():
        if joined:
            mean = embeds[joined].mean(axis=0)
            merged[chosen.index(target)] = (embeds[target] + mean) / 2
    return Joined(merged, assignment, min(margins))


def salient_and_spaced(attention: Array, count: int, share: float) -> Selection:
    """PruMerge+'s anchors."""
    score = _stretch(attention.mean(axis=0))
    number = max(1, round(share * count))
    chosen = _first(score, number)
    left = [token for token in range(len(score)) if token not in chosen]
    spaced = [left[i * len(left) // (count - number)] for i in range(count - number)]
    return Selection(np.array(sorted([*chosen, *spaced])), _gap(score, number))


def neighbourly(
    embeds: Array, attention: Array, keys: Array, anchors: Index, neighbours: int
) -> Joined:
    """PruMerge+'s merging, a token into one anchor alone; keys are [heads, size, n]."""
    weight, chosen, n = attention.mean(axis=0), [int(a) for a in anchors], len(embeds)
    cosine, margins = _cosines(keys.reshape(-1, n).T), [np.inf]
    near: list[set[int]] = []
    for anchor in chosen:
        rest = [token for token in range(n) if token != anchor]
        count = min(neighbours, len(rest))
        near.append({rest[place] for place in _first(cosine[anchor, rest], count)})
        margins.append(_gap(cosine[anchor, rest], count))
    assignment = np.full(n, -1)
    total, mass = embeds[chosen].copy(), np.ones(len(chosen))
    for token in range(n):
        if token in chosen:
            assignment[token] = chosen.index(token)
            continue
        rows = [row for row in range(len(chosen)) if token in near[row]]
        if not rows:
            continue
        likeness = np.array([cosine[token, chosen[row]] for row in rows])
        margins.append(_gap(likeness, 1))
        row = rows[int(likeness.argmax())]
        assignment[token] = row
        total[row] += weight[token] * embeds[token]
        mass[row] += weight[token]
    return Joined(total / mass[:, None], assignment, min(margins))


def budgeted(
    embeds: Array, attention: Array, count: int, crops: int, beta: float, *, by_score: bool
) -> Selection:
    """HoloV: an anchor at a time to the crop of the largest score / (anchors so far + 1)."""
    received, n = attention.mean(axis=0), len(embeds)
    parts = np.array_split(np.arange(n), min(crops, n))
    worth, rankings, margins = [], [], []
    for part in parts:
        cosine = _cosines(embeds[part])
        np.fill_diagonal(cosine, 0.0)
        least = max(len(part) - 1, 1)
        variance = np.array([((row - row.sum() / least) ** 2).sum() / least for row in cosine])
        level = received[part].mean() / (variance.mean() + 1e-6)
        score = received[part] + beta * variance * level
        worth.append(score.mean())
        order = score if by_score else received[part]
        spread = max(received.max(), 1e-9)
        margins.append(_closest(order / spread))
        rankings.append([int(part[place]) for place in _first(order, len(part))])
    chosen, spent = list[int](), [0] * len(parts)
    while len(chosen) < count:
        claims = [
            share / max(worth) / (used + 1) if used < len(ranking) else -1.0
            for share, used, ranking in zip(worth, spent, rankings, strict=True)
        ]
        best = int(np.argmax(claims))
        margins.append(_gap(np.array(claims), 1))
        chosen.append(rankings[best][spent[best]])
        spent[best] += 1
    return Selection(np.array(sorted(chosen)), min(margins))


def _cosines(rows: Array) -> Array:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(length > 0, length, 1.0)
    return unit @ unit.T


def _stretch(score: Array) -> Array:
    spread = score.max() - score.min()
    return (score - score.min()) / spread if spread > 0 else np.zeros_like(score)


def _first(score: Array, count: int) -> list[int]:
    """Return the places of the largest values, the lowest of equal ones first."""
    return sorted(range(len(score)), key=lambda place: (-score[place], place))[:count]


def _gap(score: Array, count: int) -> float:
    """Return by how much the first ``count`` lead over the rest."""
    ordered: Sequence[float] = sorted(score.tolist(), reverse=True)
    return ordered[count - 1] - ordered[count] if 0 < count < len(ordered) else np.inf


def _closest(score: Array) -> float:
    """Return the smallest difference of any two."""
    return float(np.diff(np.sort(score)).min(initial=np.inf))
