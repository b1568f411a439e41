"""The log-bias of a cluster: log size, and one plus the weights of what was merged."""

import math

import pytest
import torch

from era_vllm.steps.bias import is_pruned, log_cluster_size, log_weighted_size
from era_vllm.types import Clusters

CLUSTERS = Clusters(
    anchors=torch.tensor([[1, 3], [0, 5]]),
    assignment=torch.tensor([[0, 0, 1, 1, -1, 0], [0, 1, 1, 1, 1, 1]]),
)


def test_log_size_counts_the_anchor() -> None:
    expected = [[math.log(3), math.log(2)], [0.0, math.log(5)]]
    assert log_cluster_size(CLUSTERS).tolist() == [pytest.approx(row) for row in expected]


def test_weighted_size_counts_pruned_tokens_only() -> None:
    """An anchor weighs 1 whatever its weight; a dropped token weighs nothing."""
    weights = torch.tensor([[0.5, 100.0, 2.0, 100.0, 100.0, 0.25], [9.0, 0.1, 0.2, 0.3, 0.4, 9.0]])
    expected = [[math.log(1.75), math.log(3.0)], [0.0, math.log(2.0)]]
    found = log_weighted_size(CLUSTERS, weights)
    assert found.tolist() == [pytest.approx(row, abs=1e-6) for row in expected]


def test_weight_one_is_log_size_and_weight_zero_is_none() -> None:
    ones = torch.ones(2, 6)
    torch.testing.assert_close(log_weighted_size(CLUSTERS, ones), log_cluster_size(CLUSTERS))
    assert torch.equal(log_weighted_size(CLUSTERS, 0 * ones), torch.zeros(2, 2))


def test_small_weights_are_not_lost_beside_the_anchor_s_one() -> None:
    """ln(1 + x) for x far below the resolution of float32 around 1."""
    tiny = torch.full((2, 6), 1e-9)
    assert log_weighted_size(CLUSTERS, tiny)[1, 1].item() == pytest.approx(4e-9, rel=1e-6)


def test_pruned_are_neither_anchors_nor_dropped() -> None:
    assert is_pruned(CLUSTERS.anchors, CLUSTERS.assignment).int().tolist() == [
        [1, 0, 1, 0, 0, 1],
        [0, 1, 1, 1, 1, 0],
    ]
