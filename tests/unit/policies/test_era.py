"""ERA against its float64 oracle, its invariances, and what each option changes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from era_vllm.errors import ConfigError
from era_vllm.pipeline import prune
from era_vllm.policies.era import Policy
from era_vllm.presets import PRESETS
from era_vllm.types import Degenerate, Signal, VisualTokens
from tests import oracle
from tests.strategies import build, generic, with_signal

ATTENTION = Signal.ENCODER_ATTENTION
CLEAR = 1e-5
"""A choice made by less may rightly differ between float32 and float64."""


def paper(**changes: object) -> Policy:
    """Return the reading nearest to the paper, with changes."""
    options = {**PRESETS["paper"]["policy_options"], **changes}  # type: ignore[dict-item]
    return Policy(**options)  # type: ignore[arg-type]


def test_by_default_the_mass_is_the_size_and_the_features_weigh_more() -> None:
    tokens = build(0, (6, 6))
    pruned = prune(tokens, 6, Policy())
    sizes = torch.stack([(pruned.assignment == row).sum(-1) for row in range(6)], -1)
    assert torch.allclose(pruned.log_bias, sizes.float().log(), atol=1e-6)
    assert torch.equal(pruned.anchors, prune(tokens, 6, paper(profile_weight=0.1)).anchors)


def _oracle(
    tokens: VisualTokens, count: int, lam: float = 0.5, alpha: float = 0.3
) -> tuple[oracle.Selection, oracle.Recycled]:
    embeds = tokens.embeds[0].double().numpy()
    attention = tokens.signals[ATTENTION][0].double().numpy()
    selection = oracle.select(embeds, attention, count, lam, alpha)
    entropy = oracle.head_entropy(attention)
    return selection, oracle.recycle(embeds, selection.anchors, entropy, 0.39)


@given(
    drawn=generic(),
    lam=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    alpha=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
)
def test_matches_the_oracle(drawn: tuple[VisualTokens, int], lam: float, alpha: float) -> None:
    tokens, count = drawn
    selection, recycled = _oracle(tokens, count, lam, alpha)
    assume(min(selection.margin, recycled.margin) > CLEAR)
    policy = paper(profile_weight=lam, entropy_penalty=alpha)
    pruned = prune(tokens, count, policy)
    assert pruned.anchors[0].tolist() == selection.anchors.tolist()
    assert pruned.assignment[0].tolist() == recycled.assignment.tolist()
    np.testing.assert_allclose(pruned.embeds[0].numpy(), recycled.embeds, atol=2e-6)
    np.testing.assert_allclose(pruned.log_bias[0].exp().numpy(), recycled.mass, rtol=2e-5)


@pytest.mark.parametrize("count", [32, 64])
def test_matches_the_oracle_at_full_size(count: int) -> None:
    tokens = build(count, (24, 24), d=64, heads=16)
    selection, recycled = _oracle(tokens, count)
    assert min(selection.margin, recycled.margin) > 2e-6, "choose another seed"
    pruned = prune(tokens, count, paper())
    assert pruned.anchors[0].tolist() == selection.anchors.tolist()
    assert pruned.assignment[0].tolist() == recycled.assignment.tolist()
    np.testing.assert_allclose(pruned.log_bias[0].exp().numpy(), recycled.mass, rtol=2e-5)


@given(drawn=generic(), data=st.data())
def test_permuted_tokens_give_permuted_anchors(
    drawn: tuple[VisualTokens, int], data: st.DataObject
) -> None:
    tokens, count = drawn
    selection, recycled = _oracle(tokens, count)
    assume(min(selection.margin, recycled.margin) > CLEAR)
    order = torch.tensor(data.draw(st.permutations(range(tokens.n))))
    attention = {ATTENTION: tokens.signals[ATTENTION][:, :, order]}
    moved = VisualTokens(tokens.embeds[:, order], tokens.grid, attention)
    here, there = prune(tokens, count, paper()), prune(moved, count, paper())
    assert sorted(order[there.anchors[0]].tolist()) == here.anchors[0].tolist()
    bias = dict(zip(order[there.anchors[0]].tolist(), there.log_bias[0].tolist(), strict=True))
    for anchor, expected in zip(here.anchors[0].tolist(), here.log_bias[0].tolist(), strict=True):
        assert bias[anchor] == pytest.approx(expected, abs=1e-5)


@given(drawn=generic(), rho=st.sampled_from([0.0, 0.39, 1.0]))
def test_mean_mass_is_set_by_the_mass_scale_alone(
    drawn: tuple[VisualTokens, int], rho: float
) -> None:
    """mean b = 1 + rho (n / a - 1): the same attention for the image whatever the saliency."""
    tokens, count = drawn
    mass = prune(tokens, count, paper(mass_scale=rho)).log_bias.double().exp()
    assert float(mass.mean()) == pytest.approx(1 + rho * (tokens.n / count - 1), rel=1e-5)
    assert mass.min() >= 1


def test_default_mass_scale_is_the_paper_s_figure() -> None:
    """576 -> 64 tokens: an effective mean of b of 4.07, digitised from the paper's figure."""
    mass = prune(build(0, (24, 24), heads=16), 64, paper()).log_bias.exp()
    assert float(mass.mean()) == pytest.approx(4.07, abs=0.06)


@given(
    drawn=generic(),
    x=st.sampled_from([2.0**-20, 0.5, 4.0, 2.0**20]),
    a=st.sampled_from([2.0**-6, 0.5, 4.0]),
)
def test_scale_of_features_and_attention_does_not_matter(
    drawn: tuple[VisualTokens, int], x: float, a: float
) -> None:
    tokens, count = drawn
    scaled = replace(
        with_signal(tokens, ATTENTION, tokens.signals[ATTENTION] * a), embeds=tokens.embeds * x
    )
    here, there = prune(tokens, count, paper()), prune(scaled, count, paper())
    assert torch.equal(here.anchors, there.anchors)
    assert torch.equal(here.assignment, there.assignment)
    assert torch.equal(here.log_bias, there.log_bias)
    assert torch.equal(here.embeds * x, there.embeds)


def test_one_anchor_is_the_token_of_least_entropy() -> None:
    tokens = build(5, (4, 8), heads=5)
    entropy = oracle.head_entropy(tokens.signals[ATTENTION][0].double().numpy())
    pruned = prune(tokens, 1, paper())
    assert pruned.anchors.tolist() == [[int(entropy.argmin())]]
    assert pruned.log_bias.item() == pytest.approx(math.log(1 + 0.39 * 31), rel=1e-5)


@pytest.mark.parametrize("attention", ["zero", "flat", "same in all heads"])
def test_attention_that_says_nothing_leaves_farthest_first_from_token_0(attention: str) -> None:
    """Constant entropy: no penalty, and every pruned token weighs rho."""
    tokens = build(6, (4, 6), heads=7, kinds=(("generic", attention),))
    pruned = prune(tokens, 6, paper(profile_weight=0.0))
    expected = oracle.select(
        tokens.embeds[0].double().numpy(), np.ones((1, 24)), 6, lam=0.0, alpha=0.3
    )
    assert expected.margin > CLEAR and 0 in expected.anchors
    assert pruned.anchors[0].tolist() == expected.anchors.tolist()
    sizes = pruned.assignment[0].bincount()
    torch.testing.assert_close(pruned.log_bias[0].exp(), 1 + 0.39 * (sizes - 1))
    assert pruned.degenerate[Degenerate.NO_ATTENTION] == (24 if attention == "zero" else 0)


def test_equal_tokens_go_by_entropy_then_index_and_recycle_into_the_first() -> None:
    """Two entropies, equal features: the four focused tokens first, then the lowest indices."""
    tokens = build(0, (3, 4), heads=2, kinds=(("same", "flat"),))
    attention = torch.full((1, 2, 12), 0.5)
    focused = [2, 5, 7, 11]
    attention[0, :, focused] = torch.tensor([[0.9], [0.1]])
    tokens = with_signal(tokens, ATTENTION, attention)
    picks = [prune(tokens, count, paper(profile_weight=0.0)) for count in (1, 3, 4, 6)]
    chosen = [pruned.anchors[0].tolist() for pruned in picks]
    assert chosen == [[2], [2, 5, 7], focused, [0, 1, 2, 5, 7, 11]]
    mass = picks[2].log_bias[0].exp()
    assert mass[1:].tolist() == [1.0, 1.0, 1.0], "ties send every pruned token to the first"
    assert mass[0].item() == pytest.approx(1 + 0.39 * 8, rel=1e-5)


def test_a_single_head_leaves_features_alone() -> None:
    tokens = build(2, (4, 5), heads=1)
    other = with_signal(tokens, ATTENTION, torch.rand_like(tokens.signals[ATTENTION]) + 0.1)
    assert torch.equal(prune(tokens, 6, paper()).anchors, prune(other, 6, paper()).anchors)
    assert prune(tokens, 6, paper()).anchors[0, 0] == 0


def _mass(tokens: VisualTokens, policy: Policy) -> Tensor:
    return prune(tokens, 6, policy).log_bias[0].double().exp()


def test_weightings() -> None:
    tokens = build(3, (5, 6), heads=4)
    pruned = prune(tokens, 6, paper())
    saliency = 1 - oracle.head_entropy(tokens.signals[ATTENTION][0].double().numpy())
    literal = np.ones(6)
    for token, row in enumerate(pruned.assignment[0].tolist()):
        if token not in pruned.anchors[0].tolist():
            literal[row] += 2.0 * saliency[token]
    sizes = pruned.assignment[0].bincount().double()
    torch.testing.assert_close(_mass(tokens, paper(weighting="log_size")), sizes, rtol=1e-6, atol=0)
    assert _mass(tokens, paper(weighting="none")).tolist() == [1.0] * 6
    found = _mass(tokens, paper(weighting="literal", literal_scale=2.0))
    np.testing.assert_allclose(found.numpy(), literal, rtol=1e-5)


@pytest.mark.parametrize("weighting", ["saliency", "literal", "log_size", "none"])
def test_weighted_centroid_divides_by_the_mass(weighting: str) -> None:
    """x' = (anchor + sum of w x) / b, so that numerator and denominator of softmax agree."""
    tokens = build(3, (5, 6), heads=4)
    policy = paper(weighting=weighting, centroid="weighted")  # type: ignore[arg-type]
    pruned = prune(tokens, 6, policy)
    assert torch.equal(pruned.anchors, prune(tokens, 6, paper()).anchors)
    mean = prune(tokens, 6, replace(policy, centroid="mean"))
    assert torch.equal(pruned.log_bias, mean.log_bias)
    if weighting == "none":
        assert torch.equal(pruned.embeds[0], tokens.embeds[0, pruned.anchors[0]])
    elif weighting == "log_size":
        torch.testing.assert_close(pruned.embeds, mean.embeds)
    else:
        assert not torch.allclose(pruned.embeds, mean.embeds, atol=1e-3)
        summed = (pruned.embeds[0].double() * pruned.log_bias[0].double().exp()[:, None]).numpy()
        lone = (pruned.assignment[0].bincount() == 2).nonzero().flatten().tolist()
        assert lone, "choose another seed"
        for row in lone:
            anchor = int(pruned.anchors[0, row])
            (other,) = set((pruned.assignment[0] == row).nonzero().flatten().tolist()) - {anchor}
            weight = float(pruned.log_bias[0, row].double().exp()) - 1
            expected = tokens.embeds[0, anchor] + weight * tokens.embeds[0, other]
            np.testing.assert_allclose(summed[row], expected.numpy(), atol=1e-5)


def test_without_a_penalty_the_start_is_still_the_least_entropy() -> None:
    tokens = build(5, (4, 8), heads=5)
    entropy = oracle.head_entropy(tokens.signals[ATTENTION][0].double().numpy())
    assert int(entropy.argmin()) != 0
    anchors = prune(tokens, 1, paper(entropy_penalty=0.0)).anchors
    assert anchors.tolist() == [[int(entropy.argmin())]]


def test_searches_differ_and_weigh_entropy() -> None:
    tokens = build(3, (8, 8), heads=4)
    searches = ("additive", "multiplicative", "dpp")
    picks = [prune(tokens, 16, paper(search=name)).anchors[0].tolist() for name in searches]
    assert len(set(map(tuple, picks))) == 3
    entropy = torch.from_numpy(oracle.head_entropy(tokens.signals[ATTENTION][0].double().numpy()))
    for name in searches:
        mine = entropy[prune(tokens, 16, paper(search=name)).anchors[0]].mean()
        assert mine < entropy.mean()
    first = [prune(tokens, 1, paper(search=name)).anchors.item() for name in searches]
    assert first == [int(entropy.argmin())] * 3


@given(drawn=generic())
def test_dpp_search_weighs_diversity_by_quality(drawn: tuple[VisualTokens, int]) -> None:
    """Kernel q_i cos(x_i, x_j) q_j with q = 1 - entropy stretched to [0, 1]."""
    tokens, count = drawn
    count = min(count, 10)
    entropy = oracle.head_entropy(tokens.signals[ATTENTION][0].double().numpy())
    spread = entropy.max() - entropy.min()
    assume(spread > 1e-3)
    quality = np.maximum(1 - (entropy - entropy.min()) / spread, 1e-3)
    x = tokens.embeds[0].double().numpy()
    x = quality[:, None] * x / np.linalg.norm(x, axis=1, keepdims=True)
    kernel = x @ x.T + 0.1 * np.eye(tokens.n)
    expected = oracle.greedy_log_det(kernel, int(entropy.argmin()), count)
    assume(expected.margin > 1e-4)
    found = prune(tokens, count, paper(search="dpp", profile_weight=0.0)).anchors
    assert found[0].tolist() == expected.anchors.tolist()


def test_scores_are_needed_for_the_logit_saliency_only() -> None:
    assert paper().needs == {Signal.ENCODER_ATTENTION}
    assert paper(saliency="logit").needs == {Signal.ENCODER_ATTENTION, Signal.ENCODER_SCORES}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", 0.0), ("mass_guard", -1e-9), ("profile_weight", 1.01)),
        *(("profile_weight", -0.01), ("entropy_penalty", -0.1), ("mass_scale", -0.1)),
        *(("literal_scale", -0.1), ("temperature", float("nan"))),
        *(("mass_scale", 1e38), ("temperature", 1e-300), ("entropy_penalty", 1e300)),
    ],
)
def test_ranges(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=option):
        paper(**{option: value})  # type: ignore[arg-type]
