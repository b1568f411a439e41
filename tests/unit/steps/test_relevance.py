"""Relevance: attention by plain loops, and what a search makes of it."""

import numpy as np
import pytest
import torch

from era_vllm.steps import relevance as module
from era_vllm.steps.relevance import (
    attention_behind,
    contrast,
    has_question,
    quality,
    question_attention,
    relevance,
)
from era_vllm.types import Signal, VisualTokens
from tests.strategies import build, with_signal


def by_hand(query: torch.Tensor, key: torch.Tensor, scale: float) -> np.ndarray:
    words, heads = query.shape[:2]
    found = np.zeros((words, len(key)))
    for word in range(words):
        for head in range(heads):
            own = key[:, head * key.shape[1] // heads].double().numpy()
            score = np.exp(scale * own @ query[word, head].double().numpy())
            found[word] += score / score.sum() / heads
    return found


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_is_the_mean_over_heads_of_each_word(
    kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(kv_heads)
    query = torch.randn(5, 6, 4, generator=random)
    key = torch.randn(9, kv_heads, 4, generator=random)
    expected = by_hand(query, key, 0.5)
    found = question_attention(query, key, 0.5)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(relevance(found, "largest")[0].numpy(), expected.max(0), atol=1e-6)
    np.testing.assert_allclose(relevance(found, "mean")[0].numpy(), expected.mean(0), atol=1e-6)
    monkeypatch.setattr(module, "_NUMBERS", 2 * 6 * 9)
    np.testing.assert_allclose(question_attention(query, key, 0.5).numpy(), expected, atol=1e-6)


def given(*rows: list[float]) -> VisualTokens:
    tokens = build(0, (1, 4), kinds=(("generic", "peaked"),) * len(rows))
    return with_signal(tokens, Signal.RELEVANCE, torch.tensor(rows)[:, None])


def test_quality_is_a_power_of_the_part_of_the_largest() -> None:
    tokens = given([0.1, 0.4, 0.0, 0.2], [0.0, 0.0, 0.0, 0.0], [0.3, 0.3, 0.3, 0.3])
    asked, nothing, alike = quality(tokens, 0.5)
    torch.testing.assert_close(asked, torch.tensor([0.5, 1.0, 1e-3, 0.5**0.5]), rtol=2e-6, atol=0)
    assert nothing.tolist() == alike.tolist() == [1.0] * 4, "exactly"
    assert has_question(tokens)[:, 0].tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("theta", "expected"),
    [
        (1.0, [1 / 3 + 1e-6, 1.0, 1e-6, 2 / 3 + 1e-6]),
        (0.5, np.exp(0.5 * np.array([1 / 3, 1, 0, 2 / 3]) - 0.5).tolist()),
        (0.0, [1.0] * 4),
        (0.9999, np.exp(30 * np.array([1 / 3, 1, 0, 2 / 3]) - 30).tolist()),
    ],
)
def test_contrast_is_cdpruner_s(theta: float, expected: list[float]) -> None:
    tokens = given([0.2, 0.4, 0.1, 0.3], [0.0] * 4, [0.3] * 4)
    asked, nothing, alike = contrast(tokens, theta)
    torch.testing.assert_close(asked, torch.tensor(expected), rtol=1e-4, atol=1e-8)
    assert nothing.tolist() == alike.tolist() == [1.0] * 4


def test_noise_of_the_last_bits_is_no_difference() -> None:
    noisy = given([0.2, 0.4, 0.1, 0.2 * (1 + 1e-7)])
    for found in (quality(noisy, 0.25), contrast(noisy, 1.0)):
        assert found[0, 0] == found[0, 3]


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_behind_is_causal_among_the_last(
    kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each word, what it is by hand where it stands last and nothing follows."""
    random = torch.Generator().manual_seed(kv_heads)
    query = torch.randn(2, 6, 4, 5, generator=random)
    key = torch.randn(2, kv_heads, 11, 5, generator=random)
    expected = np.zeros((2, 4, 11))
    for row in range(2):
        for word in range(4):
            seen = 8 + word
            own = query[row, :, word][None], key[row, :, :seen].transpose(0, 1)
            expected[row, word, :seen] = by_hand(*own, 0.5)
    found = attention_behind(query, key, 0.5)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert not found[:, 0, 8:].any(), "no word sees what follows it"
    monkeypatch.setattr(module, "_NUMBERS", 3 * 2 * 6 * 11)
    np.testing.assert_allclose(attention_behind(query, key, 0.5).numpy(), expected, atol=1e-6)
