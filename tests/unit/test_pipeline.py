"""The pipeline with a policy written for the test: order of calls, what a policy is given."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import era_vllm.pipeline
from era_vllm.config import EraConfig
from era_vllm.contracts import PruningPolicy
from era_vllm.errors import PolicyError
from era_vllm.pipeline import prune
from era_vllm.policies import make_policy
from era_vllm.steps.merge import average
from era_vllm.types import Clusters, Degenerate, Signal, VisualTokens
from tests.strategies import build

ATTENTION, SCORES = Signal.ENCODER_ATTENTION, Signal.ENCODER_SCORES


@dataclass(frozen=True)
class Recorder:
    """Keeps the first tokens, drops the last one, puts the rest into cluster 0; notes its calls."""

    seen: list[tuple[str, VisualTokens, int]] = field(default_factory=list)

    @property
    def needs(self) -> frozenset[Signal]:
        """Nothing."""
        return frozenset()

    def select(self, tokens: VisualTokens, num_anchors: int) -> Tensor:
        """Return the first tokens."""
        self.seen.append(("select", tokens, num_anchors))
        return torch.arange(num_anchors).repeat(tokens.segments, 1)

    def assign(self, tokens: VisualTokens, anchors: Tensor) -> Clusters:
        """Give the anchor a weight that only a test would, and cluster 0 the rest."""
        count = anchors.shape[1]
        self.seen.append(("assign", tokens, count))
        assignment = torch.zeros(tokens.segments, tokens.n, dtype=torch.int64)
        assignment[:, :count] = torch.arange(count)
        assignment[:, -1] = -1
        weights = torch.ones(tokens.segments, tokens.n)
        weights[:, 0] = 8.0
        return Clusters(anchors, assignment, weights)

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Tensor:
        """Return another number for every anchor."""
        self.seen.append(("log_bias", tokens, clusters.anchors.shape[1]))
        return clusters.anchors.float() + 0.5


def test_steps_are_called_in_order_and_handed_on() -> None:
    policy, tokens = Recorder(), build(0, (3, 4))
    assert isinstance(policy, PruningPolicy)
    pruned = prune(tokens, 3, policy)
    assert [(name, count) for name, _, count in policy.seen] == [
        *(("select", 3), ("assign", 3), ("log_bias", 3)),
    ]
    assert pruned.anchors.tolist() == [[0, 1, 2]]
    assert pruned.log_bias.tolist() == [[0.5, 1.5, 2.5]]
    assert pruned.assignment.tolist() == [[0, 1, 2, *[0] * 8, -1]]
    members = tokens.embeds[0, [0, *range(3, 11)]]
    mean = (8 * members[0] + members[1:].sum(0)) / 16
    torch.testing.assert_close(pruned.embeds[0, 0], mean)
    assert torch.equal(pruned.embeds[0, 1:], tokens.embeds[0, 1:3])


def test_a_policy_compares_by_the_scout_and_the_rows_themselves_are_averaged() -> None:
    policy, tokens = Recorder(), build(0, (3, 4))
    states = torch.randn(1, 5, 12)
    states[0, 2, 7] = float("nan")
    scouted = replace(tokens, signals={**tokens.signals, Signal.SCOUT_STATES: states})
    pruned = prune(scouted, 3, policy)
    expected = states.nan_to_num(0.0).transpose(1, 2)
    assert all(torch.equal(seen.embeds, expected) for _, seen, _ in policy.seen)
    assert pruned.degenerate[Degenerate.NON_FINITE_ATTENTION] == 1
    assert torch.equal(pruned.embeds, prune(tokens, 3, Recorder()).embeds)
    dpp = make_policy(EraConfig(policy="dpp"))
    by_states = prune(replace(tokens, embeds=expected), 3, dpp).anchors
    assert torch.equal(prune(scouted, 3, dpp).anchors, by_states)
    assert not torch.equal(prune(tokens, 3, dpp).anchors, by_states)


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
    inf, nan = float("inf"), float("nan")
    embeds, attention, scores = (
        x.clone() for x in (tokens.embeds, tokens.signals[ATTENTION], tokens.signals[SCORES])
    )
    embeds[0, 0, :3] = torch.tensor([nan, inf, -inf])
    attention[0, 0, :4] = torch.tensor([nan, inf, -inf, -1.0])
    attention[1, :, 5] = 0.0
    scores[1, 0, :2] = torch.tensor([nan, inf])
    policy = Recorder()
    given = {**tokens.signals, ATTENTION: attention, SCORES: scores}
    spoiled = replace(tokens, embeds=embeds, signals=given)
    counts = prune(spoiled, 3, policy).degenerate
    assert counts[Degenerate.NON_FINITE_EMBEDS] == 3
    assert counts[Degenerate.NON_FINITE_ATTENTION] == 5
    assert counts[Degenerate.NO_ATTENTION] == 1
    assert counts[Degenerate.TOO_FEW_TOKENS] == 0
    _, seen, _ = policy.seen[0]
    top = torch.finfo(torch.float32).max
    assert seen.embeds[0, 0, :3].tolist() == [0.0, top, -top]
    assert seen.signals[ATTENTION][0, 0, :4].tolist() == [0.0] * 4
    assert seen.signals[SCORES][1, 0, :2].tolist() == [0.0] * 2
    for repaired, original in ((seen.embeds, embeds), (seen.signals[ATTENTION], attention)):
        good = original.isfinite() & (original >= 0)
        assert torch.equal(repaired[good], original[good])
    assert embeds[0, 0, 0].isnan(), "the caller's tensors stay as they are"


@dataclass(frozen=True)
class Faulty(Recorder):
    """Returns what no policy may, for the middle one of three segments, at one step."""

    step: str = ""
    value: float = 0.0

    def select(self, tokens: VisualTokens, num_anchors: int) -> Tensor:
        """Return the first tokens, with one anchor that is none."""
        anchors = super().select(tokens, num_anchors)
        if self.step == "select":
            anchors[1, 1] = int(self.value)
        return anchors

    def assign(self, tokens: VisualTokens, anchors: Tensor) -> Clusters:
        """Give one token (the last anchor, or one that is none) to an impossible row."""
        clusters = super().assign(tokens, anchors)
        assert clusters.weights is not None
        if self.step == "assign":
            clusters.assignment[1, 5] = int(self.value)
        if self.step == "foreign anchor":
            clusters.assignment[1, anchors[1, -1]] = int(self.value)
        if self.step == "weights":
            clusters.weights[1, 6] = self.value
        return clusters

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Tensor:
        """Return one bias that is none."""
        bias = super().log_bias(tokens, clusters)
        if self.step == "log_bias":
            bias[1, 2] = self.value
        return bias


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("step", "value"),
    [
        *(("select", value) for value in (0, -1, 12, 2**40)),
        *(("assign", value) for value in (-2, 3, 2**40)),
        ("foreign anchor", 0),
        ("foreign anchor", -1),
        *(("weights", value) for value in (-1.0, NAN, INF)),
        *(("log_bias", value) for value in (-0.1, 16.1, NAN, INF, -INF)),
    ],
)
def test_a_bad_policy_harms_one_segment_and_is_counted(step: str, value: float) -> None:
    tokens = build(0, (3, 4), kinds=(("generic", "peaked"),) * 3)
    good, pruned = prune(tokens, 3, Recorder()), prune(tokens, 3, Faulty(step=step, value=value))
    assert 1 <= pruned.degenerate[Degenerate.POLICY_OUTPUT] <= 2  # assign may follow suit
    assert not good.degenerate[Degenerate.POLICY_OUTPUT]
    assert pruned.embeds.isfinite().all() and pruned.log_bias.isfinite().all()
    assert (pruned.log_bias >= 0).all() and (pruned.anchors.diff(dim=1) > 0).all()
    assert pruned.anchors.min() >= 0 and pruned.anchors.max() < tokens.n
    assert (pruned.assignment.gather(1, pruned.anchors) == torch.arange(3)).all()
    for neighbour in (0, 2):
        for name in ("embeds", "log_bias", "anchors", "assignment"):
            expected = getattr(good, name)[neighbour]
            assert torch.equal(getattr(pruned, name)[neighbour], expected), name


@pytest.mark.parametrize("step", ["select", "assign", "log_bias"])
def test_a_policy_of_the_wrong_shape_is_told_what_is_needed(step: str) -> None:
    class Odd(Recorder):
        pass

    def wrong(tokens: VisualTokens, other: object) -> object:
        right = getattr(Recorder(), step)(tokens, other)
        return (
            replace(right, assignment=right.assignment.int()) if step == "assign" else right[:, 1:]
        )

    policy = Odd()
    object.__setattr__(policy, step, wrong)
    with pytest.raises(PolicyError, match=f"step '{step}': returned torch.* of shape .* needed"):
        prune(build(0, (3, 4)), 3, policy)


@pytest.mark.parametrize("columns", [-2, 2])
def test_an_assignment_of_another_length_is_told_what_is_needed(columns: int) -> None:
    class Odd(Recorder):
        def assign(self, tokens: VisualTokens, anchors: Tensor) -> Clusters:
            return Clusters(anchors, torch.zeros(1, tokens.n + columns, dtype=torch.int64))

    with pytest.raises(PolicyError, match=r"'assign': returned .* needed torch.int64 of shape"):
        prune(build(0, (3, 4)), 3, Odd())


def test_weights_whose_sum_has_no_number_keep_their_tokens() -> None:
    tokens = build(0, (3, 4))
    clusters = Recorder().assign(tokens, torch.arange(3)[None])
    assert clusters.weights is not None
    expected = average(tokens.embeds, clusters)
    large = replace(clusters, weights=clusters.weights * 3e37)
    torch.testing.assert_close(average(tokens.embeds, large), expected)


def test_riders_are_averaged_as_their_tokens_are_and_seen_by_nobody() -> None:
    tokens = build(0, (3, 4))
    riders = torch.randn(1, 12, 5, generator=torch.Generator().manual_seed(0))
    policy = Recorder()
    pruned = prune(replace(tokens, riders=riders), 3, policy)
    alone = prune(tokens, 3, Recorder())
    for name in ("embeds", "log_bias", "anchors", "assignment"):
        assert torch.equal(getattr(pruned, name), getattr(alone, name))
    assert alone.riders is None and pruned.riders is not None
    members = riders[0, [0, *range(3, 11)]]
    torch.testing.assert_close(pruned.riders[0, 0], (8 * members[0] + members[1:].sum(0)) / 16)
    assert torch.equal(pruned.riders[0, 1:], riders[0, 1:3])
    own = prune(replace(tokens, riders=riders), 3, Recorder(), merge=False)
    assert torch.equal(own.riders, riders[:, :3])  # type: ignore[arg-type]
    all_stay = prune(replace(tokens, riders=riders), 12, Recorder())
    assert all_stay.riders is riders


def test_missing_signals_are_all_named() -> None:
    class Needy(Recorder):
        @property
        def needs(self) -> frozenset[Signal]:
            return frozenset(Signal)

    tokens = VisualTokens(torch.zeros(1, 4, 2), (2, 2), {ATTENTION: torch.zeros(1, 2, 4)})
    missing = ", ".join(sorted(signal.value for signal in Signal if signal is not ATTENTION))
    with pytest.raises(PolicyError, match=f"needs {missing}, which"):
        prune(tokens, 2, Needy())


def test_no_tokens_are_refused_whatever_is_asked_for() -> None:
    for count in (0, 1, 5):
        with pytest.raises(PolicyError, match="n = 0"):
            prune(VisualTokens(torch.zeros(1, 0, 2), (0, 0)), count, Recorder())


def test_the_file_to_read_first_is_short() -> None:
    path = era_vllm.pipeline.__file__
    assert path is not None and len(Path(path).read_text().splitlines()) <= 80
