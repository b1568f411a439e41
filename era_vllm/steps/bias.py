"""Log-bias of an anchor: the natural log of the attention mass that it stands for.

Source: ERA Sec. "LAR" (b = 1 + sum of weights); log size: Bolya et al. 2023, arXiv:2210.09461,
Sec. 3 "proportional attention".
"""

import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor

from era_vllm.steps.merge import cluster_sizes, cluster_sum
from era_vllm.types import Clusters


def log_cluster_size(clusters: Clusters) -> Float32[Tensor, "s a"]:
    """Return ln |C|: exact where the tokens of a cluster have equal keys."""
    return cluster_sizes(clusters).float().log()


def log_weighted_size(
    clusters: Clusters, weights: Float32[Tensor, "s n"]
) -> Float32[Tensor, "s a"]:
    """Return ln(1 + sum of the weights of the pruned tokens of each cluster).

    Args:
        weights: >= 0, per token; those of anchors are not counted.
    """
    pruned = is_pruned(clusters.anchors, clusters.assignment)
    counted = torch.where(pruned, weights, 0.0)[..., None]
    total = cluster_sum(counted, clusters.assignment, clusters.anchors.shape[1])
    return total[..., 0].log1p()


def is_pruned(anchors: Int[Tensor, "s a"], assignment: Int[Tensor, "s n"]) -> Bool[Tensor, "s n"]:
    """Mark the tokens that were merged into an anchor (neither anchors nor dropped)."""
    return (assignment >= 0).scatter(1, anchors, False)
