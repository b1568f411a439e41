"""Attention that each key receives, recomputed from one encoder layer's queries and keys.

Fused attention kernels do not give probabilities, so a policy's encoder attention is one extra
n x n x hv product a segment. Source: ERA Fig. 6; the mean over queries is reconstructed
(docs/method.md, X1).
"""

from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor


def received_attention(
    query: Float[Tensor, "s n hv dh"],
    key: Float[Tensor, "s n hv dh"],
    scale: float,
    queries: Literal["all", "cls"] = "all",
) -> Float32[Tensor, "s hv n"]:
    """Return softmax over keys, averaged over queries.

    One segment at a time, so that at most one n x n x hv product exists.

    Args:
        query: As the layer's attention sees them; a CLS token, if any, first.
        key: Likewise.
        scale: Softmax scale of the layer.
        queries: ``all`` or only the ``cls`` row.
    """
    rows = query[:, :1] if queries == "cls" else query
    received: list[Tensor] = []
    for one_query, one_key in zip(rows.unbind(0), key.unbind(0), strict=True):
        scores = one_query.float().transpose(0, 1) @ one_key.float().permute(1, 2, 0)
        received.append((scores * scale).softmax(-1).mean(1))
    return torch.stack(received)


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
