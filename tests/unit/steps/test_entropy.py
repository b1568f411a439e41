"""Head profiles and their entropy, against numpy in float64 and against numbers done by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from era_vllm.steps.entropy import Saliency, head_entropy, head_profile, min_max, unattended
from era_vllm.types import Signal, VisualTokens
from tests import oracle
from tests.strategies import build, generic, with_signal

ATTENTION, SCORES = Signal.ENCODER_ATTENTION, Signal.ENCODER_SCORES


def _attended(attention: Tensor, scores: Tensor | None = None) -> VisualTokens:
    n = attention.shape[-1]
    embeds = torch.zeros(attention.shape[0], n, 1)
    signals = {ATTENTION: attention.float()}
    if scores is not None:
        signals[SCORES] = scores
    return VisualTokens(embeds, (1, n), signals)


def _entropy(tokens: VisualTokens, guard: float = 1e-3) -> Tensor:
    return head_entropy(head_profile(tokens, "share", 1.0), unattended(tokens, guard))


@given(drawn=generic())
def test_share_and_entropy_match_float64(drawn: tuple[VisualTokens, int]) -> None:
    tokens, _ = drawn
    attention = tokens.signals[ATTENTION][0].double().numpy()
    profile = head_profile(tokens, "share", 1.0)[0].numpy()
    np.testing.assert_allclose(profile, (attention / attention.sum(0)).T, rtol=1e-5)
    np.testing.assert_allclose(
        _entropy(tokens)[0].numpy(), oracle.head_entropy(attention), atol=2e-6
    )


def test_entropy_of_known_profiles() -> None:
    even, single, half = [0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]
    attention = torch.tensor([even, single, half]).T[None]
    torch.testing.assert_close(_entropy(_attended(attention)), torch.tensor([[1.0, 0.0, 0.5]]))


def test_entropy_of_the_paper_s_two_drawn_tokens() -> None:
    """ERA figure: six heads share .15 .15 .25 .15 .10 .20, or one head takes .80."""
    spread, focused = [0.15, 0.15, 0.25, 0.15, 0.10, 0.20], [0.05, 0.80, 0.03, 0.04, 0.05, 0.03]
    entropy = _entropy(_attended(torch.tensor([spread, focused]).T[None]))[0]
    by_hand = [-sum(y * math.log2(y) for y in row) / math.log2(6) for row in (spread, focused)]
    assert entropy.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert entropy[1] < 0.5 < 0.9 < entropy[0]


@given(drawn=generic(), factor=st.sampled_from([2.0**-8, 0.25, 2.0, 2.0**10]))
def test_scale_of_attention_does_not_matter(drawn: tuple[VisualTokens, int], factor: float) -> None:
    tokens, _ = drawn
    scaled = with_signal(tokens, ATTENTION, tokens.signals[ATTENTION] * factor)
    assert torch.equal(_entropy(tokens), _entropy(scaled))


def test_a_single_head_says_nothing() -> None:
    assert torch.equal(_entropy(_attended(torch.rand(2, 1, 9))), torch.ones(2, 9))


def test_unattended_tokens_have_entropy_one() -> None:
    """One head only looks at each token: entropy 0, except below the guard or at zero mass."""
    attention = torch.zeros(1, 3, 5)
    attention[0, 0] = torch.tensor([1.0, 1.0, 1.0, 0.9e-3, 0.0])
    assert _entropy(_attended(attention)).tolist() == [[0.0, 0.0, 0.0, 1.0, 1.0]]
    assert _entropy(_attended(attention), guard=0.0).tolist() == [[0.0, 0.0, 0.0, 0.0, 1.0]]


def test_guard_is_relative_to_the_median_of_an_even_number() -> None:
    """Masses 1, 1, 3, 3: the median is 2, so a guard of .6 takes the two below 1.2."""
    attention = torch.tensor([[[1.0, 3.0, 1.0, 3.0]]])
    assert unattended(_attended(attention), 0.6).tolist() == [[True, False, True, False]]
    assert not unattended(_attended(attention), 0.4).any()


@pytest.mark.parametrize("heads", [2, 3, 7, 12, 16, 64])
def test_rounding_noise_is_no_difference(heads: int) -> None:
    """Heads that agree give every token the same entropy, whatever its mass."""
    mass = torch.rand(4, 1, 200, generator=torch.Generator().manual_seed(heads)) + 1e-3
    entropy = _entropy(_attended(mass.expand(4, heads, 200).clone()))
    assert torch.equal(min_max(entropy), torch.zeros(4, 200))


@given(seed=st.integers(0, 2**32 - 1), temperature=st.sampled_from([0.25, 1.0, 3.0]))
def test_softmax_forms_match_float64(seed: int, temperature: float) -> None:
    tokens = build(seed, (3, 5), heads=4)
    attention, scores = (
        x[0].double().numpy() for x in (tokens.signals[ATTENTION], tokens.signals[SCORES])
    )
    standard = attention - attention.mean(1, keepdims=True)
    standard /= np.sqrt((standard**2).mean(1, keepdims=True))
    forms: dict[Saliency, oracle.Array] = {
        "softmax": attention,
        "zscore": standard,
        "logit": scores,
    }
    for saliency, raw in forms.items():
        weight = np.exp(raw / temperature)
        found = head_profile(tokens, saliency, temperature)[0].numpy()
        np.testing.assert_allclose(found, (weight / weight.sum(0)).T, rtol=2e-5)


def test_min_max_stretches_each_segment_alone() -> None:
    x = torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.5, 0.5], [0.25, 0.0, 0.5]])
    assert min_max(x).tolist() == [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [0.5, 0.0, 1.0]]
