"""The laws of a pruning policy, run on every file of ``policies/`` and every choice it offers.

A policy that a law cannot hold for is named with the reason; a new file is held to all of them.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Final, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from era_vllm.contracts import PruningPolicy
from era_vllm.errors import PolicyError
from era_vllm.pipeline import prune
from era_vllm.policies import defaults, make_policy, policy_class, policy_names
from era_vllm.types import DEGENERATE_KINDS, Degenerate, PrunedTokens, Signal, VisualTokens
from tests.guards import HostRead, operations, without_host_reads
from tests.strategies import (
    batches,
    build,
    convert,
    gather,
    repeats,
    segment,
    with_signal,
    without,
)

ATTENTION: Final = Signal.ENCODER_ATTENTION
NOT_NESTED: Final = {
    "uniform": "the stride changes",
    "pool": "the cells change",
    "mfpruner": "a ranking votes for its first K",
    "vispruner": "both halves grow",
    "visionzip": "the step changes",
    "prumerge": "the stride changes",
}
BY_POSITION: Final = {
    "uniform": "stride",
    "pool": "cell",
    "random": "hash of the position",
    "vispruner": "every second token is held against the others",
    "visionzip": "step",
    "prumerge": "stride",
    "holov": "crop",
}
TAKES_SOME: Final = tuple(map(policy_class, ("visionzip", "prumerge")))
"""One anchor of theirs takes nothing, or its neighbours."""
IN_ROUNDS: Final = {"vispruner": "a round for each eight duplicates, up to 64"}
EXTREMES: Final[dict[str, dict[str, tuple[float, ...]]]] = {
    "era": {
        "profile_weight": (0.0, 1.0),
        "entropy_penalty": (0.0,),
        "mass_scale": (0.0,),
        "mass_guard": (10.0,),
        "relevance_weight": (0.25, 4.0),
    },
    "dpp": {"ridge": (1e-9,), "relevance_weight": (0.25, 4.0)},
    "mfpruner": {"relevance": (True,)},
    "cdpruner": {"theta": (0.0, 0.5, 0.999)},
    "entropyprune": {"trace_norm": (False,)},
    "vispruner": {"important": (0.0, 1.0)},
    "visionzip": {"dominant": (0.0, 1.0)},
    "prumerge": {"salient": (0.0, 1.0), "neighbours": (1,)},
    "holov": {"crops": (1, 1000), "variance": (0.0, 1000.0)},
}
"""Numeric options at the ends of their ranges, beside the defaults."""


def _variants() -> dict[str, PruningPolicy]:
    """Every policy with its defaults, then with each other value of each option."""
    found: dict[str, PruningPolicy] = {}
    for name in policy_names():
        found[name] = make_policy(defaults(name))
        hints = get_type_hints(policy_class(name))
        values: dict[str, tuple[object, ...]] = {
            option: get_args(hint) for option, hint in hints.items() if get_origin(hint) is Literal
        }
        for option, choices in (values | EXTREMES.get(name, {})).items():
            for value in choices:
                policy = replace(found[name], **{option: value})
                if policy != found[name]:
                    found[f"{name}-{option}={value}"] = policy
    return found


VARIANTS: Final = _variants()
FEW: Final = settings(max_examples=max(4, settings().max_examples // 6))
"""Examples for each of many variants; each is a batch of segments of several kinds."""
every_policy = pytest.mark.parametrize("policy", VARIANTS.values(), ids=VARIANTS.keys())


def _law(exempt: dict[str, str]) -> pytest.MarkDecorator:
    held = {key: value for key, value in VARIANTS.items() if key.split("-")[0] not in exempt}
    return pytest.mark.parametrize("policy", held.values(), ids=held.keys())


def _drops(policy: PruningPolicy) -> bool:
    """Whether pruned tokens are dropped, all of them."""
    return getattr(policy, "rest", "merged") == "dropped"


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _assert_same(one: PrunedTokens, other: PrunedTokens, what: str) -> None:
    for name in ("embeds", "log_bias", "anchors", "assignment"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype, f"{what}: {name}"
        assert torch.equal(_bits(left), _bits(right)), f"{what}: {name}"


def _row(pruned: PrunedTokens, index: int) -> PrunedTokens:
    rows = {
        name: getattr(pruned, name)[index : index + 1]
        for name in ("embeds", "log_bias", "anchors", "assignment")
    }
    return replace(pruned, **rows)


@pytest.mark.parametrize("name", policy_names())
def test_policy_is_a_frozen_dataclass_that_keeps_the_protocol(name: str) -> None:
    policy = make_policy(defaults(name))
    assert isinstance(policy, PruningPolicy)
    assert is_dataclass(policy) and not isinstance(policy, type)
    assert hash(policy) == hash(make_policy(defaults(name)))
    for field in fields(policy):
        with pytest.raises(AttributeError):
            setattr(policy, field.name, getattr(policy, field.name))


def test_exemptions_name_policies_that_exist() -> None:
    assert {*NOT_NESTED, *BY_POSITION, *IN_ROUNDS, *EXTREMES} <= set(policy_names())


@every_policy
@FEW
@given(batch=batches())
def test_clusters_partition_the_tokens(
    policy: PruningPolicy, batch: tuple[VisualTokens, int]
) -> None:
    tokens, count = batch
    pruned = prune(tokens, count, policy)
    assert pruned.anchors.shape == (tokens.segments, count)
    assert (pruned.anchors.diff(dim=1) > 0).all(), "ascending, none twice"
    assert int(pruned.anchors.min()) >= 0 and int(pruned.anchors.max()) < tokens.n
    assert pruned.embeds.dtype == tokens.embeds.dtype and pruned.embeds.isfinite().all()
    assert pruned.log_bias.dtype == torch.float32 and pruned.log_bias.isfinite().all()
    assert (pruned.log_bias >= 0).all()
    for index in range(tokens.segments):
        assignment = pruned.assignment[index].tolist()
        assert set(assignment) <= set(range(-1, count))
        for row, anchor in enumerate(pruned.anchors[index].tolist()):
            assert assignment[anchor] == row, "an anchor is in its own cluster"
    assert not pruned.degenerate[Degenerate.POLICY_OUTPUT]


@every_policy
@FEW
@given(batch=batches())
def test_merged_token_lies_among_its_cluster(
    policy: PruningPolicy, batch: tuple[VisualTokens, int]
) -> None:
    tokens, count = batch
    pruned = prune(tokens, count, policy)
    for index in range(tokens.segments):
        for row in range(count):
            members = tokens.embeds[index, pruned.assignment[index] == row].double()
            merged = pruned.embeds[index, row].double()
            if len(members) == 1:
                assert torch.equal(merged, members[0]), "a cluster of one keeps its values"
            slack = 1e-6 * members.abs().amax() + 1e-30
            if tokens.embeds.dtype != torch.float32:
                slack = 0.0  # the cast rounds to the nearest value, which a member is
                low, high = members.amin(0), members.amax(0)
            else:
                low, high = members.amin(0) - slack, members.amax(0) + slack
            assert ((merged >= low) & (merged <= high)).all()


@every_policy
@FEW
@given(batch=batches())
def test_same_input_same_bits_and_input_untouched(
    policy: PruningPolicy, batch: tuple[VisualTokens, int]
) -> None:
    tokens, count = batch
    before = [segment(tokens, index) for index in range(tokens.segments)]
    _assert_same(prune(tokens, count, policy), prune(tokens, count, policy), "second run")
    for index, kept in enumerate(before):
        assert torch.equal(kept.embeds, tokens.embeds[index : index + 1])
        assert torch.equal(
            kept.signals[Signal.ENCODER_ATTENTION], tokens.signals[ATTENTION][index : index + 1]
        )


@every_policy
@FEW
@given(batch=batches(), copy=st.booleans())
def test_segment_has_the_same_bits_alone_and_in_a_batch(
    policy: PruningPolicy, batch: tuple[VisualTokens, int], copy: bool
) -> None:
    tokens, count = batch
    together = prune(tokens, count, policy)
    for index in range(tokens.segments):
        alone = prune(segment(tokens, index, copy=copy), count, policy)
        _assert_same(alone, _row(together, index), f"segment {index} of {tokens.segments}")


@every_policy
@pytest.mark.parametrize(
    ("grid", "d", "count"), [((3, 11), 7, 1), ((3, 11), 7, 5), ((12, 12), 48, 16)]
)
def test_segment_has_the_same_bits_beside_any_neighbours(
    policy: PruningPolicy, grid: tuple[int, int], d: int, count: int
) -> None:
    kinds = (("generic", "peaked"), ("twins", "partly zero"), ("outliers", "peaked"))
    tokens = build(5, grid, d, heads=5, kinds=kinds)
    alone = [prune(segment(tokens, index), count, policy) for index in range(3)]
    for order in ((1, 0), (2, 1, 0), (0, 0, 1, 2), (2, 2, 1, 0, 1)):
        mixed = gather(tokens, order)
        together = prune(mixed, count, policy)
        for place, index in enumerate(order):
            _assert_same(alone[index], _row(together, place), f"place {place} of {order}")


@_law(NOT_NESTED)
@FEW
@given(batch=batches(least=3), data=st.data())
def test_fewer_anchors_are_a_subset(
    policy: PruningPolicy, batch: tuple[VisualTokens, int], data: st.DataObject
) -> None:
    tokens, count = batch
    fewer = data.draw(st.integers(1, count))
    many, few = (prune(tokens, size, policy).anchors for size in (count, fewer))
    for index in range(tokens.segments):
        assert set(few[index].tolist()) <= set(many[index].tolist())


@_law(BY_POSITION)
@FEW
@given(repeated=repeats())
def test_of_equal_tokens_the_lowest_index_comes_first(
    policy: PruningPolicy, repeated: tuple[VisualTokens, Tensor, int]
) -> None:
    tokens, source, count = repeated
    for chosen in prune(tokens, count, policy).anchors.tolist():
        for anchor in chosen:
            equal = (source[:anchor] == source[anchor]).nonzero().flatten().tolist()
            assert set(equal) <= set(chosen), f"{anchor} before one of {equal}"


@_law(BY_POSITION)
@pytest.mark.parametrize("attention", ["flat", "zero", "same in all heads"])
def test_tokens_without_a_difference_are_taken_in_order(
    policy: PruningPolicy, attention: str
) -> None:
    tokens = with_signal(
        build(3, (3, 5), kinds=(("same", attention),)),
        Signal.ENCODER_SCORES,
        torch.zeros(1, 3, 15),
    )
    if getattr(policy, "saliency", "share") in ("softmax", "zscore") and attention != "zero":
        tokens = with_signal(tokens, ATTENTION, torch.full((1, 3, 15), 1 / 15))
    if attention != "zero":
        tokens = with_signal(tokens, Signal.CLASS_ATTENTION, torch.full((1, 3, 15), 1 / 15))
        tokens = with_signal(tokens, Signal.RELEVANCE, torch.full((1, 1, 15), 1 / 15))
    if getattr(policy, "mass_guard", 0.0) > 1:
        tokens = with_signal(tokens, ATTENTION, torch.zeros(1, 3, 15))
    for count in (1, 4, 14):
        pruned = prune(tokens, count, policy)
        assert pruned.anchors.tolist() == [list(range(count))]
        pruned_tokens = [-1 if _drops(policy) else 0] * (15 - count)
        assert pruned.assignment.tolist() == [[*range(count), *pruned_tokens]]


@every_policy
@FEW
@given(batch=batches(), extra=st.integers(0, 3))
def test_keeping_all_tokens_changes_nothing(
    policy: PruningPolicy, batch: tuple[VisualTokens, int], extra: int
) -> None:
    tokens, _ = batch
    pruned = prune(tokens, tokens.n + extra, policy)
    identity = torch.arange(tokens.n).expand(tokens.segments, -1)
    assert torch.equal(_bits(pruned.embeds), _bits(tokens.embeds))
    assert torch.equal(pruned.log_bias, torch.zeros(tokens.segments, tokens.n))
    assert torch.equal(pruned.anchors, identity) and torch.equal(pruned.assignment, identity)
    counts = [0] * DEGENERATE_KINDS
    counts[Degenerate.TOO_FEW_TOKENS] = tokens.segments if extra else 0
    assert pruned.degenerate.tolist() == counts


@every_policy
@pytest.mark.parametrize("count", [0, -3])
@pytest.mark.parametrize("grid", [(3, 5), (1, 1)])
def test_at_least_one_token_stays(policy: PruningPolicy, count: int, grid: tuple[int, int]) -> None:
    tokens = build(1, grid)
    _assert_same(prune(tokens, count, policy), prune(tokens, 1, policy), f"K = {count}")


@every_policy
@FEW
@given(batch=batches())
def test_one_anchor_takes_all_or_none(
    policy: PruningPolicy, batch: tuple[VisualTokens, int]
) -> None:
    tokens, _ = batch
    pruned = prune(tokens, 1, policy)
    assert pruned.anchors.shape == (tokens.segments, 1)
    if not _drops(policy) and not isinstance(policy, TAKES_SOME):
        assert (pruned.assignment == 0).all()


@every_policy
@FEW
@given(batch=batches())
def test_what_is_dropped_leaves_no_trace(
    policy: PruningPolicy, batch: tuple[VisualTokens, int]
) -> None:
    tokens, count = batch
    pruned = prune(tokens, count, policy)
    if not _drops(policy):
        return
    own = torch.stack([x[rows] for x, rows in zip(tokens.embeds, pruned.anchors, strict=True)])
    assert torch.equal(_bits(pruned.embeds), _bits(own)) and not pruned.log_bias.any()
    assert int((pruned.assignment >= 0).sum()) == tokens.segments * count


@every_policy
@FEW
@given(batch=batches())
def test_switches_change_only_what_they_name(
    policy: PruningPolicy, batch: tuple[VisualTokens, int]
) -> None:
    tokens, count = batch
    both = prune(tokens, count, policy)
    unbiased = prune(tokens, count, policy, bias=False)
    unmerged = prune(tokens, count, policy, merge=False)
    neither = prune(tokens, count, policy, merge=False, bias=False)
    own = torch.stack([x[rows] for x, rows in zip(tokens.embeds, both.anchors, strict=True)])
    silent = torch.zeros(both.log_bias.shape)
    _assert_same(unbiased, replace(both, log_bias=silent), "bias off")
    _assert_same(unmerged, replace(both, embeds=own), "merge off")
    _assert_same(neither, replace(both, embeds=own, log_bias=silent), "both off")


@every_policy
def test_no_tokens_are_refused(policy: PruningPolicy) -> None:
    with pytest.raises(PolicyError, match="n = 0"):
        prune(build(0, (0, 0)), 1, policy)


@every_policy
def test_each_needed_signal_is_asked_for(policy: PruningPolicy) -> None:
    tokens = build(1, (3, 5))
    for signal in policy.needs:
        with pytest.raises(PolicyError, match=signal.value):
            prune(without(tokens, signal), 4, policy)


@every_policy
@FEW
@given(batch=batches())
def test_no_other_signal_is_used(policy: PruningPolicy, batch: tuple[VisualTokens, int]) -> None:
    tokens, count = batch
    bare = without(tokens, *(set(Signal) - policy.needs))
    _assert_same(prune(tokens, count, policy), prune(bare, count, policy), "without the others")


BAD: Final = (float("nan"), float("inf"), float("-inf"))


@every_policy
@FEW
@given(batch=batches(least=4), data=st.data())
def test_bad_numbers_are_repaired_counted_and_stay_in_their_segment(
    policy: PruningPolicy, batch: tuple[VisualTokens, int], data: st.DataObject
) -> None:
    tokens, count = batch
    victim = data.draw(st.integers(0, tokens.segments - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    floats = [signal for signal, x in tokens.signals.items() if x.is_floating_point()]
    names = ("embeds", *floats)
    spoiled: dict[object, Tensor] = {"embeds": tokens.embeds.clone()}
    spoiled |= {signal: x.clone() for signal, x in tokens.signals.items()}
    hits: dict[object, int] = {}
    for name in names:
        flat = spoiled[name][victim].view(-1)
        hits[name] = data.draw(st.integers(0, flat.numel()), label=str(name))
        where = torch.from_numpy(rng.permutation(flat.numel())[: hits[name]])
        flat[where] = torch.tensor(rng.choice(BAD, hits[name]), dtype=flat.dtype)
    bad = VisualTokens(spoiled.pop("embeds"), tokens.grid, spoiled)
    clean, pruned = prune(tokens, count, policy), prune(bad, count, policy)
    assert pruned.embeds.isfinite().all() and pruned.log_bias.isfinite().all()
    assert (pruned.log_bias >= 0).all() and (pruned.anchors.diff(dim=1) > 0).all()
    counts = pruned.degenerate.tolist()
    assert counts[Degenerate.NON_FINITE_EMBEDS] == hits["embeds"]
    assert counts[Degenerate.NON_FINITE_ATTENTION] == sum(hits[signal] for signal in floats)
    dark = spoiled[ATTENTION].nan_to_num(0, 0, 0).sum(1) == 0
    assert counts[Degenerate.NO_ATTENTION] == int(dark.sum())
    for index in set(range(tokens.segments)) - {victim}:
        _assert_same(_row(pruned, index), _row(clean, index), f"neighbour {index}")


@every_policy
def test_negative_attention_counts_as_none(policy: PruningPolicy) -> None:
    tokens, found = build(2, (4, 5)), list[PrunedTokens]()
    for value in (-1.0, 0.0):
        spoiled = tokens
        for signal in (ATTENTION, Signal.CLASS_ATTENTION, Signal.RELEVANCE):
            x = tokens.signals[signal].clone()
            x[:, :, 3:9] = value
            spoiled = with_signal(spoiled, signal, x)
        found.append(prune(spoiled, 5, policy))
    one, other = found
    _assert_same(one, other, "negative attention")
    assert one.degenerate[Degenerate.NO_ATTENTION] == 6


@every_policy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@FEW
@given(data=st.data())
def test_choices_are_made_in_float32(
    policy: PruningPolicy, dtype: torch.dtype, data: st.DataObject
) -> None:
    tokens, count = data.draw(batches())
    half = replace(tokens, embeds=tokens.embeds.to(dtype))
    narrow = prune(half, count, policy)
    wide = prune(replace(half, embeds=half.embeds.float()), count, policy)
    _assert_same(narrow, replace(wide, embeds=wide.embeds.to(dtype)), "half precision")


@every_policy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torch_default_dtype_does_not_matter(policy: PruningPolicy, dtype: torch.dtype) -> None:
    tokens = build(4, (4, 6), kinds=(("generic", "peaked"), ("twins", "partly zero")))
    expected = [prune(tokens, count, policy) for count in (6, 24)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = [prune(tokens, count, policy) for count in (6, 24)]
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(found, expected, strict=True):
        _assert_same(one, other, f"default {dtype}")


@every_policy
@pytest.mark.parametrize("count", [1, 5])
def test_no_value_is_read_on_the_host(policy: PruningPolicy, count: int) -> None:
    tokens = build(4, (4, 6), kinds=(("generic", "peaked"), ("same", "zero")))
    without_host_reads(lambda: prune(tokens, count, policy))


def _truth(x: Tensor) -> bool:
    return bool(x.sum() > 0)


@pytest.mark.parametrize(
    "read",
    [
        *(_truth, torch.nonzero, Tensor.tolist, torch.unique, torch.bincount),
        *(lambda x: x[x > 0], lambda x: x.max().item(), lambda x: torch.equal(x, x)),
        *(lambda x: int(x[0]), lambda x: x.repeat_interleave(x), lambda x: torch.where(x > 0)),
    ],
)
def test_the_guard_sees_host_reads(read: Callable[[Tensor], object]) -> None:
    with pytest.raises(HostRead):
        without_host_reads(lambda: read(torch.tensor([1, 0, 2])))


@every_policy
@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("count", [1, 5])
def test_shapes_do_not_depend_on_values(policy: PruningPolicy, device: str, count: int) -> None:
    tokens = build(4, (4, 6), kinds=(("generic", "peaked"),) * 2)
    expected = prune(tokens, count, policy)
    if device == "meta":
        found = prune(convert(tokens, lambda x: x.to("meta")), count, policy)
    else:
        with FakeTensorMode() as mode:
            found = prune(convert(tokens, mode.from_tensor), count, policy)
    for name in ("embeds", "log_bias", "anchors", "assignment", "degenerate"):
        left, right = getattr(found, name), getattr(expected, name)
        assert (left.shape, left.dtype) == (right.shape, right.dtype), name


@_law(IN_ROUNDS)
def test_work_is_batched_over_segments_and_tokens(policy: PruningPolicy) -> None:
    few = build(4, (4, 6), kinds=(("generic", "peaked"),) * 2)
    more_segments = build(4, (4, 6), kinds=(("generic", "peaked"),) * 7)
    more_tokens = build(4, (8, 12), kinds=(("generic", "peaked"),) * 2)
    launched = [
        operations(lambda tokens=tokens: prune(tokens, 5, policy))
        for tokens in (few, more_segments, more_tokens)
    ]
    assert launched[0] == launched[1] == launched[2] > 0
