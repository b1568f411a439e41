"""Policies that read what is asked: with nothing asked they are those that do not read it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from era_vllm.contracts import PruningPolicy
from era_vllm.errors import ConfigError
from era_vllm.pipeline import prune
from era_vllm.policies import cdpruner, dpp, era, mfpruner
from era_vllm.types import Signal, VisualTokens
from tests.strategies import batches, build, segment, with_signal, without

PAIRS: dict[str, tuple[PruningPolicy, PruningPolicy]] = {
    "dpp": (dpp.Policy(relevance_weight=0.25), dpp.Policy()),
    "mfpruner": (mfpruner.Policy(relevance=True), mfpruner.Policy()),
    "era": (era.Policy(relevance_weight=0.25), era.Policy()),
    "era, multiplicative": (
        era.Policy(search="multiplicative", relevance_weight=0.25),
        era.Policy(search="multiplicative"),
    ),
    "era, dpp": (era.Policy(search="dpp", relevance_weight=0.25), era.Policy(search="dpp")),
    "cdpruner": (cdpruner.Policy(), cdpruner.Policy(theta=0.0)),
}
"""Asking, and what it is without a question."""
each = pytest.mark.parametrize(("asking", "plain"), PAIRS.values(), ids=PAIRS.keys())


@each
@given(drawn=batches())
def test_where_nothing_is_asked_it_is_the_plain_one_whatever_the_neighbours(
    asking: PruningPolicy, plain: PruningPolicy, drawn: tuple[VisualTokens, int]
) -> None:
    tokens, count = drawn
    silent = tokens.signals[Signal.RELEVANCE].clone()
    silent[0] = 0.0
    some = with_signal(tokens, Signal.RELEVANCE, silent)
    together = prune(some, count, asking)
    alone = prune(segment(some, 0), count, plain)
    assert torch.equal(together.anchors[:1], alone.anchors)
    assert torch.equal(together.assignment[:1], alone.assignment)
    assert torch.equal(together.log_bias[:1], alone.log_bias)


@each
def test_two_questions_keep_other_tokens(asking: PruningPolicy, plain: PruningPolicy) -> None:
    tokens = build(5, (6, 8), d=24, heads=4)
    ask = torch.rand(2, 1, 1, 48, generator=torch.Generator().manual_seed(1)) ** 4
    one, other = (prune(with_signal(tokens, Signal.RELEVANCE, x), 8, asking).anchors for x in ask)
    assert not torch.equal(one, other)
    if plain.needs != asking.needs:
        found = prune(without(tokens, Signal.RELEVANCE), 8, plain).anchors
        assert not torch.equal(one, found)


def test_more_weight_keeps_more_of_what_is_relevant() -> None:
    tokens = build(5, (8, 12), d=24, heads=4)
    relevance = torch.full((1, 1, 96), 0.7)
    relevance[..., 20:44] = 1.0
    tokens = with_signal(tokens, Signal.RELEVANCE, relevance)
    kept = [
        int(((anchors >= 20) & (anchors < 44)).sum())
        for weight in (0.0, 0.25, 4.0)
        for anchors in [prune(tokens, 16, dpp.Policy(relevance_weight=weight)).anchors]
    ]
    assert kept[0] < kept[1] < kept[2] == 15, "all but the medoid"


def test_a_relevant_token_needs_one_more_vote() -> None:
    """Attention names 1 and 3, likeness, which is all the same, 0 and 1; then the sum decides."""
    tokens = build(3, (1, 6), heads=2, kinds=(("same", "peaked"),))
    attention = torch.tensor([[[0.1, 0.3, 0.05, 0.3, 0.05, 0.2]]])
    tokens = with_signal(tokens, Signal.CLASS_ATTENTION, attention)
    assert prune(tokens, 2, mfpruner.Policy()).anchors[0].tolist() == [1, 3]
    for asked, kept in (([0.5, 0, 1, 0, 0, 0], [0, 1]), ([0, 0, 0.5, 0, 0, 1], [1, 5])):
        some = with_signal(tokens, Signal.RELEVANCE, torch.tensor([[asked]], dtype=torch.float32))
        votes = prune(some, 2, mfpruner.Policy(relevance=True)).anchors[0].tolist()
        assert votes == kept


@pytest.mark.parametrize("weight", [-0.1, 4.1, float("nan")])
def test_ranges(weight: float) -> None:
    for policy in (dpp.Policy(), era.Policy()):
        with pytest.raises(ConfigError, match="relevance_weight"):
            replace(policy, relevance_weight=weight)
    with pytest.raises(ConfigError, match="theta"):
        cdpruner.Policy(theta=weight)
