"""The reducer against the pipeline, segment by segment, on layouts of every kind."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import era_vllm.vllm_plugin.reducer as reducer_module
from era_vllm.config import EraConfig
from era_vllm.layout import Layout, SegmentLayout, one_grid
from era_vllm.pipeline import prune
from era_vllm.plan import Plan, plan
from era_vllm.policies import make_policy
from era_vllm.types import Signal, VisualTokens
from era_vllm.vllm_plugin.encoder_pass import Encoded
from era_vllm.vllm_plugin.fields import Planned
from era_vllm.vllm_plugin.packing import unpack
from era_vllm.vllm_plugin.reducer import PrunedItem, Reducer
from era_vllm.vllm_plugin.signals.pixel_hash import PixelHash
from tests.layouts import layouts

D, RIDERS, HEADS = 6, 4, 3


def item(layout: Layout, rate: float, seed: int, config: EraConfig) -> Encoded:
    """Return an item of noise."""
    generator = torch.Generator().manual_seed(seed)
    planned = Planned(plan(layout, rate, config), seed - 7)
    rows = torch.randn(layout.length, D + RIDERS, generator=generator)
    attention = torch.rand(HEADS, layout.length, generator=generator)
    (hashes,) = PixelHash().after([planned], [])[Signal.PIXEL_HASH]
    signals = {Signal.ENCODER_ATTENTION: attention, Signal.PIXEL_HASH: hashes}
    return Encoded(planned, rows, signals)


def expected(one: Encoded, config: EraConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, biases and places, one segment after the other and then put in order."""
    layout, policy = one.item.plan.layout, make_policy(config)
    rows, bias, places = [], [], []
    for j, (segment, count) in enumerate(
        zip(layout.segments, one.item.plan.num_anchors, strict=True)
    ):
        own = one.rows[segment.places][None]
        attention = one.signals[Signal.ENCODER_ATTENTION][None, :, segment.places]
        signals = {
            Signal.ENCODER_ATTENTION: attention,
            Signal.PIXEL_HASH: one.signals[Signal.PIXEL_HASH][j : j + 1],
        }
        tokens = VisualTokens(own[..., :D], segment.grid, signals, own[..., D:])
        result = prune(tokens, count, policy)
        assert result.riders is not None
        rows.append(torch.cat([result.embeds[0], result.riders[0]], -1))
        bias.append(result.log_bias[0])
        places.append(segment.places[result.anchors[0]])
    separators = one.item.plan.separators
    rows.append(one.rows[separators])
    bias.append(torch.zeros(len(separators)))
    order = torch.cat([*places, separators]).argsort()
    at = torch.cat([*places, separators])[order]
    return torch.cat(rows)[order], torch.cat(bias)[order], layout.position_offsets[at]


@given(
    some=st.lists(
        st.tuples(layouts(), st.sampled_from([0.0, 0.5, 0.8, 0.95]), st.integers(0, 2**31)),
        min_size=1,
        max_size=5,
    ),
    policy=st.sampled_from(["era", "random", "pool"]),
)
def test_every_item_is_what_its_segments_are_alone(
    some: list[tuple[Layout, float, int]], policy: str
) -> None:
    config = EraConfig(policy=policy)
    items = [item(*one, config) for one in some]
    heard: list[PrunedItem] = []
    reducer = Reducer(make_policy(config), config, D)
    reducer.listeners.append(heard.extend)
    for one, packed in zip(items, reducer(items), strict=True):
        rows, bias, offsets = expected(one, config)
        found = unpack(packed, 1)
        assert len(packed) == sum(one.item.plan.kept)
        assert torch.equal(found.rows, rows)
        torch.testing.assert_close(found.log_bias, bias, rtol=0, atol=1e-6)
        assert torch.equal(found.offsets, offsets)
    assert [one.item for one in heard] == [one.item for one in items]
    assert [len(one.segments) for one in heard] == [len(one[0].segments) for one in some]


def test_a_call_of_the_pipeline_is_bounded(monkeypatch) -> None:
    config = EraConfig(policy="era")
    calls: list[tuple[int, int]] = []

    def counted(tokens: VisualTokens, num_anchors: int, *rest: object, **more: object) -> object:
        calls.append((tokens.segments, num_anchors))
        return prune(tokens, num_anchors, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(reducer_module, "prune", counted)
    monkeypatch.setattr(reducer_module, "_MOST_SIMILARITIES", 3 * 12 * 12)
    items = [item(one_grid(3, 4, ()), 0.5, seed, config) for seed in range(7)]
    reducer = Reducer(make_policy(config), config, D)
    whole = reducer(items)
    assert calls == [(3, 6), (3, 6), (1, 6)]
    monkeypatch.setattr(reducer_module, "_MOST_SIMILARITIES", 1)
    assert all(map(torch.equal, whole, reducer(items)))
    calls.clear()
    reducer.rehearse(items)
    assert calls == [(1, 11)]


def test_no_call_has_more_tokens_than_were_rehearsed(monkeypatch) -> None:
    config = EraConfig(policy="era")
    calls: list[int] = []

    def counted(tokens: VisualTokens, *rest: object, **more: object) -> object:
        calls.append(tokens.segments * tokens.n)
        return prune(tokens, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(reducer_module, "prune", counted)
    monkeypatch.setattr(reducer_module, "_MOST_TOKENS", 24)
    items = [item(one_grid(3, 4, ()), 0.5, seed, config) for seed in range(5)]
    unseen = Reducer(make_policy(config), config, D)
    whole = unseen(items)
    assert calls == [24, 24, 12]  # nothing was rehearsed
    calls.clear()
    rehearsed = Reducer(make_policy(config), config, D)
    rehearsed.rehearse(items[:3])
    assert calls == [36] and all(map(torch.equal, whole, rehearsed(items)))
    assert calls == [36, 36, 24]


def test_segments_of_an_item_have_hashes_of_their_own() -> None:
    layout = Layout((), 2, (SegmentLayout((1, 2), torch.arange(2)),))
    plans = Plan(layout, (1, 1, 1))
    (found,) = PixelHash().after([Planned(plans, 2**62 + 5)], [])[Signal.PIXEL_HASH]
    assert found[0] == 2**62 + 5 and len(set(found.tolist())) == 3
