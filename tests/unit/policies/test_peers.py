"""The peers against brute force in float64, at the size of tests and at a picture's."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from jaxtyping import Float

from era_vllm.contracts import PruningPolicy
from era_vllm.errors import ConfigError
from era_vllm.pipeline import prune
from era_vllm.policies import (
    divprune,
    entropyprune,
    holov,
    mfpruner,
    prumerge,
    visionzip,
    vispruner,
)
from era_vllm.steps.matrix_entropy import matrix_entropy
from era_vllm.types import Signal, VisualTokens
from tests import oracle, oracle_peers
from tests.peers import CASES, Chosen, numbers, received
from tests.strategies import build, generic, with_signal

CLEAR = 1e-5
"""A choice made by less may rightly differ between float32 and float64."""
each = pytest.mark.parametrize(("policy", "expected"), CASES.values(), ids=CASES.keys())


@each
@given(drawn=generic())
def test_anchors_are_brute_force_s(
    policy: PruningPolicy, expected: Chosen, drawn: tuple[VisualTokens, int]
) -> None:
    tokens, count = drawn
    found = expected(tokens, count)
    assume(found.margin > CLEAR)
    assert prune(tokens, count, policy).anchors[0].tolist() == found.anchors.tolist()


@each
def test_anchors_are_brute_force_s_at_a_picture_s_size(
    policy: PruningPolicy, expected: Chosen
) -> None:
    clear = 0
    for seed in range(40):
        tokens = build(seed, (12, 12), d=48, heads=8)
        found = expected(tokens, (8, 16, 32)[seed % 3])
        if found.margin > 2e-6:
            clear += 1
            anchors = prune(tokens, len(found.anchors), policy).anchors
            assert anchors[0].tolist() == found.anchors.tolist()
    assert clear >= 3, "choose other seeds"


Merging = Callable[[VisualTokens, oracle.Index], oracle_peers.Joined]
MERGING: dict[str, tuple[PruningPolicy, Merging]] = {
    "visionzip": (
        visionzip.Policy(),
        lambda tokens, anchors: oracle_peers.zipped(
            numbers(tokens),
            received(tokens),
            numbers(tokens, Signal.ENCODER_KEYS),
            anchors,
            0.84375,
        ),
    ),
    **{
        f"prumerge, {neighbours}": (
            prumerge.Policy(neighbours=neighbours),
            lambda tokens, anchors, neighbours=neighbours: oracle_peers.neighbourly(
                numbers(tokens),
                received(tokens),
                numbers(tokens, Signal.ENCODER_KEYS),
                anchors,
                neighbours,
            ),
        )
        for neighbours in (32, 3)
    },
}


@pytest.mark.parametrize(("policy", "expected"), MERGING.values(), ids=MERGING.keys())
@given(drawn=generic())
def test_merged_tokens_are_brute_force_s(
    policy: PruningPolicy, expected: Merging, drawn: tuple[VisualTokens, int]
) -> None:
    tokens, count = drawn
    pruned = prune(tokens, count, policy)
    found = expected(tokens, pruned.anchors[0].numpy())
    assume(found.margin > CLEAR)
    assert pruned.assignment[0].tolist() == found.assignment.tolist()
    np.testing.assert_allclose(pruned.embeds[0].numpy(), found.embeds, atol=2e-6)
    assert not pruned.log_bias.any()


@pytest.mark.parametrize("module", [visionzip, prumerge])
def test_log_size_is_of_what_joined(module: object) -> None:
    tokens = build(3, (6, 8), heads=4)
    policy = module.Policy(weighting="log_size")  # type: ignore[attr-defined]
    pruned = prune(tokens, 9, policy)
    sizes = torch.stack([(pruned.assignment[0] == row).sum() for row in range(9)])
    torch.testing.assert_close(pruned.log_bias[0].exp(), sizes.float())
    assert int(sizes.max()) > 1


@pytest.mark.parametrize(
    "module", [mfpruner, entropyprune, divprune, vispruner, holov], ids=lambda m: m.__name__
)
def test_the_rest_merges_on_request_without_another_choice(module: object) -> None:
    tokens = build(3, (6, 8), heads=4)
    dropped = prune(tokens, 9, module.Policy())  # type: ignore[attr-defined]
    merged = prune(tokens, 9, module.Policy(rest="merged"))  # type: ignore[attr-defined]
    assert torch.equal(dropped.anchors, merged.anchors)
    sizes = merged.assignment[0].bincount()
    torch.testing.assert_close(merged.log_bias[0].exp(), sizes.float())
    assert int(sizes.sum()) == 48


@given(
    heads=st.integers(2, 9), size=st.integers(1, 12), seed=st.integers(0, 2**31), norm=st.booleans()
)
def test_matrix_entropy_is_that_of_singular_values(
    heads: int, size: int, seed: int, norm: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(2, heads, size, 5)) * 10.0 ** rng.uniform(-2, 2)
    found = matrix_entropy(torch.from_numpy(rows).float(), trace_norm=norm)
    for one, own in zip(found, rows.astype(np.float32).astype(np.float64), strict=True):
        expected = oracle_peers.entropies(own, trace_norm=norm)
        np.testing.assert_allclose(one.numpy(), expected, atol=1e-6, rtol=1e-6)


def test_matrix_entropy_of_known_tokens() -> None:
    """One direction: 0. Two of three heads' differences, equally long: ln 2 / ln 3."""
    line = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    triangle = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])
    same = torch.ones(3, 2)
    rows = torch.stack([line, triangle, same, torch.zeros(3, 2)], -1)[None]
    found = matrix_entropy(rows)[0].tolist()
    assert found == pytest.approx([0.0, np.log(2) / np.log(3), 0.0, 0.0], abs=1e-7)
    assert not matrix_entropy(rows[:, :1]).any(), "a single head"


def test_the_rotary_embedding_does_not_change_the_entropy() -> None:
    """It turns all heads of a token alike."""
    tokens = build(0, (4, 5))
    rows = tokens.signals[Signal.LANGUAGE_QUERIES][:, :, :4]
    angle = torch.arange(20.0)[None, None] * torch.tensor([1.0, 0.1])[None, :, None]
    even, odd = rows[:, :, :2], rows[:, :, 2:]
    turned = torch.cat(
        [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], 2
    )
    torch.testing.assert_close(matrix_entropy(turned), matrix_entropy(rows), rtol=0, atol=1e-6)
    assert not torch.allclose(turned, rows)


def test_parts_of_a_large_batch_are_what_it_is_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(3, 4, 5, 17, generator=torch.Generator().manual_seed(0))
    whole = matrix_entropy(rows)
    monkeypatch.setattr("era_vllm.steps.matrix_entropy._NUMBERS", 100)
    assert torch.equal(matrix_entropy(rows), whole)


def votes(**scores: list[float]) -> VisualTokens:
    """Return tokens of one head with this attention, and features of these angles."""
    angle = torch.tensor([scores["angle"]])
    x: Float[torch.Tensor, "1 n 2"] = torch.stack([angle.cos(), angle.sin()], -1)
    tokens = VisualTokens(x, (1, x.shape[1]))
    return with_signal(tokens, Signal.CLASS_ATTENTION, torch.tensor([[scores["attention"]]]))


def test_two_votes_beat_a_larger_sum() -> None:
    """Token 4 is second in both lists; 3 is first in one, and its sum is twice as large."""
    angle, attention = [0.0] * 9, [0.0] * 9
    angle[3:6], attention[3:6] = [1.0, 1.05, 1.5], [1.0, 0.3, 0.29]
    tokens = votes(angle=angle, attention=attention)
    assert prune(tokens, 2, mfpruner.Policy()).anchors[0].tolist() == [4, 5]
    assert prune(tokens, 1, mfpruner.Policy()).anchors[0].tolist() == [5], "none has two: the sum"


def test_budgets_of_crops() -> None:
    """Twice the attention, twice the anchors; what a full crop has no room for goes on."""
    attention = torch.tensor([*[0.2] * 4, *[0.1] * 4, *[0.7] * 4])[None, None]
    tokens = VisualTokens(torch.randn(1, 12, 3), (3, 4), {Signal.CLASS_ATTENTION: attention})
    policy = holov.Policy(crops=3, variance=0.0)
    crops = [prune(tokens, count, policy).anchors[0] // 4 for count in (3, 7, 10)]
    assert [crop.bincount(minlength=3).tolist() for crop in crops] == [
        [0, 0, 3],
        [2, 1, 4],
        [4, 2, 4],
    ]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: entropyprune.Policy(entropyprune_k=0), "entropyprune_k: got 0, .* era-vllm ecl"),
        (lambda: vispruner.Policy(important=1.1), "important"),
        (lambda: visionzip.Policy(dominant=-0.1), "dominant"),
        (lambda: visionzip.Policy(dominant=float("nan")), "dominant"),
        (lambda: prumerge.Policy(salient=2.0), "salient"),
        (lambda: prumerge.Policy(neighbours=0), "neighbours"),
        (lambda: holov.Policy(crops=0), "crops"),
        (lambda: holov.Policy(variance=-1.0), "variance"),
    ],
)
def test_ranges(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()
