"""Attention that each key receives, against loops in float64."""

from typing import Literal

import numpy as np
import pytest
import torch

from era_vllm.steps.received_attention import mean_scores, received_attention


@pytest.mark.parametrize("queries", ["all", "cls"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_loops(queries: Literal["all", "cls"], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    query, key = (torch.from_numpy(rng.normal(size=(2, 9, 3, 8))).to(dtype) for _ in range(2))
    attention = np.zeros((2, 3, 9))
    scores = np.zeros((2, 3, 9))
    rows = range(1) if queries == "cls" else range(9)
    for s in range(2):
        for head in range(3):
            for row in rows:
                q, k = query[s, row, head].double().numpy(), key[s, :, head].double().numpy()
                score = 0.3 * (k @ q)
                weight = np.exp(score)
                attention[s, head] += weight / weight.sum() / len(rows)
                scores[s, head] += score / len(rows)
    found = received_attention(query, key, 0.3, queries)
    np.testing.assert_allclose(found.numpy(), attention, atol=1e-6)
    np.testing.assert_allclose(mean_scores(query, key, 0.3, queries).numpy(), scores, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3))
