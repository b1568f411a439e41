"""Attention that each key receives, recomputed from one encoder layer's queries and keys.

Fused attention kernels do not give probabilities, so a policy's encoder attention is one extra
product of queries and keys a segment: of all n queries, or of a sample of ``MOST_QUERIES``.
Source: ERA Fig. 6; the mean over queries is reconstructed (docs/method.md, X1), its sample is ours
(docs/segments.md).
"""

from functools import lru_cache
from typing import Final, Literal

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

MOST_QUERIES: Final = 2048
"""Queries that are averaged over; of more, as many evenly spaced ones."""
MOST_SCORES: Final = MOST_QUERIES**2
"""Scores a head at once, 16 MiB in float32 (256 MiB of 16 heads): the least at which a segment of
``MOST_QUERIES`` tokens is read in one part, as it always was, bit for bit."""
_GOLDEN: Final = 2654435769
"""2^32 / golden ratio: Knuth, The Art of Computer Programming, Vol. 3, Sec. 6.4."""


def received_attention(
    query: Float[Tensor, "s m hv dh"],
    key: Float[Tensor, "s n hv dh"],
    scale: float,
    queries: Literal["all", "cls"] = "all",
) -> Float32[Tensor, "s hv n"]:
    """Return softmax over keys, averaged over queries.

    One segment at a time and some queries at a time, so that ``MOST_SCORES`` x hv scores exist at
    most (where a query alone has more, its own), and their softmax.

    Args:
        query: As the layer's attention sees them, m = n; a CLS token, if any, first.
        key: Likewise.
        scale: Softmax scale of the layer.
        queries: ``all`` or only the ``cls`` row.
    """
    rows = query[:, :1] if queries == "cls" else query
    received: list[Tensor] = []
    if rows.shape[1] > MOST_QUERIES:
        rows = rows[:, _sample_on(rows.device, rows.shape[1])]
    at_once = max(1, MOST_SCORES // key.shape[1])
    for one_query, one_key in zip(rows.unbind(0), key.unbind(0), strict=True):
        keys = one_key.float().permute(1, 2, 0)
        mean = torch.zeros(keys.shape[0], keys.shape[2], device=keys.device)
        for first in range(0, len(one_query), at_once):
            part = one_query[first : first + at_once].float().transpose(0, 1)
            weight = (part @ keys).mul_(scale).softmax(-1)
            mean += weight.mean(1) * (part.shape[1] / len(one_query))
        received.append(mean)
    return torch.stack(received)


@lru_cache(maxsize=64)
def _sample_on(device: torch.device, n: int) -> Int[Tensor, "count"]:
    return sample(n, MOST_QUERIES).to(device)


def sample(n: int, count: int) -> Int[Tensor, "count"]:
    """Return ``count`` of n indices, ascending, one out of each of as many stretches; on the CPU.

    Not the first of each: on a grid these may be the tokens of a few columns. Where in its stretch
    an index lies follows the multiples of the golden ratio, which favour no column.

    Args:
        n: <= 2^20.
        count: <= n.
    """
    ends = torch.arange(count + 1) * n // count
    within = torch.arange(count) * _GOLDEN % 2**32
    return ends[:-1] + (within * ends.diff() >> 32)


def mean_scores(
    query: Float[Tensor, "s n hv dh"],
    key: Float[Tensor, "s n hv dh"],
    scale: float,
    queries: Literal["all", "cls"] = "all",
) -> Float32[Tensor, "s hv n"]:
    """Return each key's attention score before softmax, averaged over queries: linear, so cheap."""
    rows = query[:, :1] if queries == "cls" else query
    mean = rows.float().mean(1)
    return (key.float() * mean[:, None]).sum(-1).transpose(1, 2) * scale
