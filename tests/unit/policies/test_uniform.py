"""uniform: an even stride in raster order."""

import pytest
import torch

from era_vllm.pipeline import prune
from era_vllm.policies.uniform import Policy
from era_vllm.types import VisualTokens


@pytest.mark.parametrize("n", [2, 7, 33, 576])
def test_gaps_differ_by_at_most_one(n: int) -> None:
    tokens = VisualTokens(torch.zeros(2, n, 3), (1, n))
    for count in sorted({1, 2, n // 3, n // 2, 2 * n // 3, n - 1} - {0}):
        anchors = prune(tokens, count, Policy()).anchors
        assert torch.equal(anchors[0], anchors[1]) and anchors[0, 0] == 0
        gaps = torch.cat([anchors[0], torch.tensor([n])]).diff()
        assert gaps.max() - gaps.min() <= 1


def test_every_third_of_nine() -> None:
    tokens = VisualTokens(torch.zeros(1, 9, 1), (3, 3))
    assert prune(tokens, 3, Policy()).anchors.tolist() == [[0, 3, 6]]
