"""Token merging: every pruned token joins an anchor, and the anchor becomes the cluster's mean.

Source: ERA Sec. "BTR"; cosine matching and the plain mean are reconstructed (docs/method.md,
X7, X8).
"""

from typing import Final, Literal

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from era_vllm.steps.similarity import length, nearest_anchor, unit
from era_vllm.types import Clusters, VisualTokens

Matching = Literal["cosine", "dot"]
Rest = Literal["dropped", "merged"]
_LARGE: Final = 1e30


def nearest(
    tokens: VisualTokens,
    anchors: Int[Tensor, "s a"],
    *,
    matching: Matching = "cosine",
) -> Clusters:
    """Assign each token to its most similar anchor."""
    lengths = length(tokens.embeds) if matching == "dot" else None
    return Clusters(anchors, nearest_anchor(unit(tokens.embeds), anchors, lengths))


def alone(tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
    """Drop all tokens but the anchors."""
    row = torch.arange(anchors.shape[1], device=anchors.device).expand_as(anchors)
    dropped = torch.full((tokens.segments, tokens.n), -1, device=anchors.device)
    return Clusters(anchors, dropped.scatter(1, anchors, row))


def with_rest(tokens: VisualTokens, anchors: Int[Tensor, "s a"], rest: Rest) -> Clusters:
    """Drop the pruned tokens, or merge each into its most similar anchor."""
    return alone(tokens, anchors) if rest == "dropped" else nearest(tokens, anchors)


def average(rows: Float[Tensor, "s n c"], clusters: Clusters) -> Float[Tensor, "s a c"]:
    """Return each cluster's weighted mean, taken in float32 and cast back; empty clusters give 0.

    Args:
        rows: Finite.
        clusters: An anchor's weight is > 0.
    """
    assignment, num_anchors = clusters.assignment, clusters.anchors.shape[1]
    row = assignment.clamp_min(0)
    if clusters.weights is None:
        share = 1.0 / cluster_sizes(clusters).gather(1, row).float()
    else:
        top = clusters.weights.amax(-1, keepdim=True)  # their sum may pass float32's range
        weights = clusters.weights / torch.where(top > _LARGE, top, 1.0)
        total = cluster_sum(weights[..., None], assignment, num_anchors)[..., 0]
        share = weights / total.gather(1, row)
    # Shares first, sum after: a cluster of one keeps its bits, and no finite value overflows (the
    # clamp takes back the last bit by which equal largest values may do so).
    mean = cluster_sum(rows.float() * share[..., None], assignment, num_anchors)
    top = torch.finfo(rows.dtype).max
    return mean.clamp(-top, top).to(rows.dtype)


def cluster_sizes(clusters: Clusters) -> Int[Tensor, "s a"]:
    """Return the tokens in each cluster, its anchor included."""
    kept = clusters.assignment >= 0
    sizes = torch.zeros_like(clusters.anchors)
    return sizes.scatter_add_(1, clusters.assignment.clamp_min(0), kept.long())


def cluster_sum(
    x: Float32[Tensor, "s n c"], assignment: Int[Tensor, "s n"], num_anchors: int
) -> Float[Tensor, "s a c"]:
    """Sum rows by cluster, in token order; -1 is left out.

    Sorted segments instead of scattered adds: the same bits on every run, on a GPU too.
    """
    segments = assignment.shape[0]
    offset = torch.arange(segments, device=x.device)[:, None] * num_anchors
    dropped = segments * num_anchors
    key = torch.where(assignment >= 0, assignment + offset, dropped).flatten()
    order = key.argsort(stable=True)
    lengths = torch.zeros(dropped + 1, dtype=torch.int64, device=x.device)
    lengths.scatter_add_(0, key, torch.ones_like(key))
    rows, lengths = x.flatten(0, 1)[order], lengths[:dropped]  # those left out come last
    total = torch.segment_reduce(rows, "sum", lengths=lengths, unsafe=True)
    return total.view(segments, num_anchors, -1)
