"""Attention that each key receives, against loops in float64."""

from typing import Literal

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from era_vllm.steps import received_attention as module
from era_vllm.steps.received_attention import (
    MOST_SCORES,
    mean_scores,
    received_attention,
    sample,
)


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


def _realistic(n: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [1, n, 2, 16]; a query attends much by its column in the grid."""
    generator = torch.Generator().manual_seed(n)
    column = (torch.arange(n) % side).float()[:, None]
    wave = torch.cat([(column * 3.14159 / 4).cos(), (column * 3.14159 / 4).sin()], 1)
    of_column = torch.cat([wave, torch.zeros(n, 14)], 1)[None, :, None]
    noise = torch.randn(2, 1, n, 2, 16, generator=generator)
    return 0.5 * noise[0] + 2 * of_column, noise[1]


def _whole(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    scores = query[0].double().transpose(0, 1) @ key[0].double().permute(1, 2, 0)
    return (scores * scale).softmax(-1).mean(1)[None]


def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = _realistic(300, 20)
    whole = received_attention(query, key, 0.25)
    for scores in (1, 299, 300 * 7, 300 * 150, 300 * 299):
        monkeypatch.setattr(module, "MOST_SCORES", scores)
        found = received_attention(query, key, 0.25)
        torch.testing.assert_close(found, whole, atol=1e-8, rtol=1e-6)
    monkeypatch.setattr(module, "MOST_SCORES", 300 * 300)
    assert torch.equal(received_attention(query, key, 0.25), whole)


def test_up_to_its_bound_bits_are_those_of_one_product() -> None:
    query, key = _realistic(2048, 64)
    scores = query[0].transpose(0, 1) @ key[0].permute(1, 2, 0)
    expected = (scores * 0.25).softmax(-1).mean(1)[None]
    assert torch.equal(received_attention(query, key, 0.25), expected)


class _Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("n", [2048, 4096, 9000])
def test_memory_is_bounded(n: int) -> None:
    query, key = _realistic(n, 64)
    with _Largest() as seen:
        received_attention(query, key, 0.25)
    assert 2 * MOST_SCORES // 2 < seen.most <= 2 * MOST_SCORES, "of two heads"


@pytest.mark.parametrize(("n", "count"), [(7, 7), (8, 7), (3000, 2048), (16384, 2048), (2**20, 64)])
def test_a_sample_takes_one_of_each_stretch(n: int, count: int) -> None:
    found = sample(n, count)
    ends = torch.tensor([i * n // count for i in range(count + 1)])
    assert (found >= ends[:-1]).all() and (found < ends[1:]).all()


@pytest.mark.parametrize("side", [64, 96, 128, 256])
def test_a_sample_favours_no_column(side: int) -> None:
    columns = (sample(side * side, 2048) % side).bincount(minlength=side)
    assert columns.max() <= 1.5 * 2048 / side and columns.min() >= 0.5 * 2048 / side


def test_a_sample_of_queries_reads_what_all_of_them_receive() -> None:
    """Where attention hangs on a query's column, which an even step would hit or miss."""
    query, key = _realistic(8192, 64)
    whole = _whole(query, key, 0.25)
    error = (received_attention(query, key, 0.25) - whole) / whole
    stepped = (_whole(query[:, ::4], key, 0.25) - whole) / whole  # columns 0, 4, 8, ...
    assert error.abs().mean() < 0.01 and error.mean().abs() < 0.002
    assert error.abs().mean() < 0.2 * stepped.abs().mean()
    torch.testing.assert_close(received_attention(query, key, 0.25).sum(-1), torch.ones(1, 2))


def test_a_sample_does_not_hang_on_neighbours() -> None:
    query, key = _realistic(2500, 50)
    both = received_attention(torch.cat([query, key]), torch.cat([key, query]), 0.25)
    assert torch.equal(both[:1], received_attention(query, key, 0.25))
