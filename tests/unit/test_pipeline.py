"""The pipeline with a policy written for the test: order of calls, what a policy is given."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import era_vllm.pipeline
from era_vllm.contracts import PruningPolicy
from era_vllm.errors import PolicyError
from era_vllm.pipeline import prune
from era_vllm.types import Clusters, Degenerate, Signal, VisualTokens
from tests.strategies import build


@dataclass(frozen=True)
class Recorder:
    """Keeps the first tokens, drops the last one, puts the rest into cluster 0; notes its calls."""

    seen: list[tuple[str, VisualTokens, int]] = field(default_factory=list)

    prompt_dependent: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Signal]:
        """Nothing."""
        return frozenset()

    def select(self, tokens: VisualTokens, num_anchors: int) -> Tensor:
        """Return the first tokens."""
        self.seen.append(("select", tokens, num_anchors))
        return torch.arange(num_anchors).repeat(tokens.segments, 1)

    def merge(self, tokens: VisualTokens, anchors: Tensor) -> Clusters:
        """Return embeddings that only a test would make."""
        count = anchors.shape[1]
        self.seen.append(("merge", tokens, count))
        assignment = torch.zeros(tokens.segments, tokens.n, dtype=torch.int64)
        assignment[:, :count] = torch.arange(count)
        assignment[:, -1] = -1
        sizes = torch.stack([row[row >= 0].bincount() for row in assignment])
        embeds = torch.full((tokens.segments, count, tokens.embeds.shape[2]), 7.0)
        return Clusters(anchors, assignment, embeds, sizes)

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Tensor:
        """Return another number for every anchor."""
        self.seen.append(("log_bias", tokens, clusters.anchors.shape[1]))
        return clusters.anchors.float() + 0.5


def test_steps_are_called_in_order_and_handed_on() -> None:
    policy, tokens = Recorder(), build(0, (3, 4))
    assert isinstance(policy, PruningPolicy)
    pruned = prune(tokens, 3, policy)
    assert [(name, count) for name, _, count in policy.seen] == [
        *(("select", 3), ("merge", 3), ("log_bias", 3)),
    ]
    assert pruned.anchors.tolist() == [[0, 1, 2]]
    assert pruned.log_bias.tolist() == [[0.5, 1.5, 2.5]]
    assert pruned.assignment.tolist() == [[0, 1, 2, *[0] * 8, -1]]
    assert torch.equal(pruned.embeds, torch.full((1, 3, 7), 7.0))


def test_switches() -> None:
    tokens = build(0, (3, 4))
    off = prune(tokens, 3, Recorder(), merge=False, bias=False)
    assert torch.equal(off.embeds, tokens.embeds[:, :3]) and not off.log_bias.any()
    assert prune(tokens, 3, Recorder(), merge=False).log_bias.tolist() == [[0.5, 1.5, 2.5]]


@pytest.mark.parametrize(("count", "given"), [(-5, 1), (0, 1), (1, 1), (11, 11)])
def test_policy_is_asked_for_one_to_n_minus_one(count: int, given: int) -> None:
    policy = Recorder()
    prune(build(0, (3, 4)), count, policy)
    assert policy.seen[0][2] == given


@pytest.mark.parametrize(("grid", "count"), [((3, 4), 12), ((3, 4), 99), ((1, 1), 1), ((1, 1), 0)])
def test_policy_is_not_asked_where_all_stay(grid: tuple[int, int], count: int) -> None:
    policy, tokens = Recorder(), build(0, grid)
    pruned = prune(tokens, count, policy)
    assert not policy.seen and pruned.embeds is tokens.embeds
    assert pruned.degenerate[Degenerate.TOO_FEW_TOKENS] == int(count > tokens.n)


def test_policy_sees_finite_tokens_and_every_repair_is_counted() -> None:
    tokens = build(0, (3, 4), kinds=(("generic", "peaked"),) * 2)
    assert tokens.attention is not None and tokens.scores is not None
    inf, nan = float("inf"), float("nan")
    embeds, attention, scores = (
        x.clone() for x in (tokens.embeds, tokens.attention, tokens.scores)
    )
    embeds[0, 0, :3] = torch.tensor([nan, inf, -inf])
    attention[0, 0, :4] = torch.tensor([nan, inf, -inf, -1.0])
    attention[1, :, 5] = 0.0
    scores[1, 0, :2] = torch.tensor([nan, inf])
    policy = Recorder()
    spoiled = replace(tokens, embeds=embeds, attention=attention, scores=scores)
    counts = prune(spoiled, 3, policy).degenerate
    assert counts[Degenerate.NON_FINITE_EMBEDS] == 3
    assert counts[Degenerate.NON_FINITE_ATTENTION] == 5
    assert counts[Degenerate.NO_ATTENTION] == 1
    assert counts[Degenerate.TOO_FEW_TOKENS] == 0
    _, seen, _ = policy.seen[0]
    top = torch.finfo(torch.float32).max
    assert seen.embeds[0, 0, :3].tolist() == [0.0, top, -top]
    assert seen.attention is not None and seen.scores is not None
    assert seen.attention[0, 0, :4].tolist() == [0.0] * 4
    assert seen.scores[1, 0, :2].tolist() == [0.0] * 2
    for repaired, original in ((seen.embeds, embeds), (seen.attention, attention)):
        good = original.isfinite() & (original >= 0)
        assert torch.equal(repaired[good], original[good])
    assert embeds[0, 0, 0].isnan(), "the caller's tensors stay as they are"


def test_missing_signals_are_all_named() -> None:
    class Needy(Recorder):
        @property
        def needs(self) -> frozenset[Signal]:
            return frozenset(Signal)

    tokens = VisualTokens(torch.zeros(1, 4, 2), (2, 2), attention=torch.zeros(1, 2, 4))
    with pytest.raises(PolicyError, match="needs encoder attention scores, pixel hash, which"):
        prune(tokens, 2, Needy())


def test_no_tokens_are_refused_whatever_is_asked_for() -> None:
    for count in (0, 1, 5):
        with pytest.raises(PolicyError, match="n = 0"):
            prune(VisualTokens(torch.zeros(1, 0, 2), (0, 0)), count, Recorder())


def test_the_file_to_read_first_is_short() -> None:
    path = era_vllm.pipeline.__file__
    assert path is not None and len(Path(path).read_text().splitlines()) <= 80
