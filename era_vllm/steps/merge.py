"""Token merging: every pruned token joins an anchor, and the anchor becomes the cluster's mean.

Source: ERA Sec. "BTR"; cosine matching and the plain mean are reconstructed (METHODS X7, X8).
"""

from typing import Literal

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from era_vllm.steps.similarity import length, nearest_anchor, unit
from era_vllm.types import Clusters, VisualTokens

Matching = Literal["cosine", "dot"]


def merge_to_nearest(
    tokens: VisualTokens,
    anchors: Int[Tensor, "s a"],
    *,
    matching: Matching = "cosine",
) -> Clusters:
    """Assign each token to its most similar anchor and average the clusters."""
    lengths = length(tokens.embeds) if matching == "dot" else None
    assignment = nearest_anchor(unit(tokens.embeds), anchors, lengths)
    return merge_by_assignment(tokens, anchors, assignment)


def merge_by_assignment(
    tokens: VisualTokens,
    anchors: Int[Tensor, "s a"],
    assignment: Int[Tensor, "s n"],
    weights: Float32[Tensor, "s n"] | None = None,
) -> Clusters:
    """Average the given clusters in float32 and cast back.

    Args:
        assignment: Row of each token's anchor; -1 = dropped.
        weights: Of each token in its cluster's mean, > 0; None = equal.
    """
    num_anchors = anchors.shape[1]
    kept = assignment >= 0
    row = assignment.clamp_min(0)
    sizes = kept.new_zeros(anchors.shape, dtype=torch.int64).scatter_add_(1, row, kept.long())
    if weights is None:
        share = 1.0 / sizes.gather(1, row).float()
    else:
        total = cluster_sum(weights[..., None], assignment, num_anchors)[..., 0]
        share = weights / total.gather(1, row)
    # Shares first, sum after: a cluster of one keeps its bits, and no finite value overflows (the
    # clamp takes back the last bit by which equal largest values may do so).
    mean = cluster_sum(tokens.embeds.float() * share[..., None], assignment, num_anchors)
    top = torch.finfo(tokens.embeds.dtype).max
    return Clusters(anchors, assignment, mean.clamp(-top, top).to(tokens.embeds.dtype), sizes)


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
    total = torch.segment_reduce(x.flatten(0, 1)[order], "sum", lengths=lengths, unsafe=True)
    return total[:dropped].view(segments, num_anchors, -1)
