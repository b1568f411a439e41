"""The lab's blocks against the engine's reducer, which shares only the cut and the pipeline."""

from dataclasses import replace

import pytest
import torch

from era_vllm.config import EraConfig
from era_vllm.lab.blocks import prune_blocks
from era_vllm.layout import cut, one_grid
from era_vllm.pipeline import prune
from era_vllm.plan import plan
from era_vllm.policies import make_policy, uniform
from era_vllm.types import Clusters, Signal, VisualTokens
from era_vllm.vllm_plugin.encoder_pass import Encoded
from era_vllm.vllm_plugin.fields import Planned
from era_vllm.vllm_plugin.reducer import Reducer
from era_vllm.vllm_plugin.signals.pixel_hash import PixelHash


@pytest.fixture
def tokens() -> VisualTokens:
    generator = torch.Generator().manual_seed(5)
    return VisualTokens(
        torch.randn(2, 91, 16, generator=generator),
        (7, 13),
        {
            Signal.ENCODER_ATTENTION: torch.rand(2, 3, 91, generator=generator),
            Signal.PIXEL_HASH: torch.tensor([2**62 + 3, -7]),
        },
    )


@pytest.mark.parametrize("policy", ["era", "dpp", "random", "pool"])
@pytest.mark.parametrize("most", [16, 30, 50])
def test_blocks_are_the_engines(tokens: VisualTokens, policy: str, most: int) -> None:
    config = EraConfig(policy=policy, max_segment=most)
    found = prune_blocks(tokens, config, 0.8)
    layout = cut(one_grid(7, 13, ()), most)
    own = plan(layout, 0.8, config)
    items = [Planned(own, int(name)) for name in tokens.pixel_hash]
    hashes = PixelHash().after(items, [])[Signal.PIXEL_HASH]
    heard = []
    reducer = Reducer(make_policy(config), config, None)
    reducer.listeners.append(heard.extend)
    attention = tokens.signal(Signal.ENCODER_ATTENTION)
    signals = (
        {Signal.ENCODER_ATTENTION: attention[i], Signal.PIXEL_HASH: hashes[i]} for i in (0, 1)
    )
    triples = zip(items, tokens.embeds, signals, strict=True)
    reducer([Encoded(item, rows, signal) for item, rows, signal in triples])
    for row, item in enumerate(heard):
        at = found.anchors[row].tolist()
        assert at == sorted(at) and len(at) == sum(own.num_anchors)
        for block, segment in zip(layout.segments, item.segments, strict=True):
            theirs, mine = segment.result, [at.index(p) for p in block.places if p in at]
            anchors = block.places[theirs.anchors[segment.row]]
            assert anchors.tolist() == [at[i] for i in mine]
            assert torch.equal(found.log_bias[row, mine], theirs.log_bias[segment.row])
            assert torch.equal(found.embeds[row, mine], theirs.embeds[segment.row])
            of_tokens = anchors[theirs.assignment[segment.row]]
            assert torch.equal(found.anchors[row][found.assignment[row, block.places]], of_tokens)


def test_a_small_picture_is_pruned_as_it_always_was(tokens: VisualTokens) -> None:
    config = EraConfig()
    found, whole = prune_blocks(tokens, config, 0.8), prune(tokens, 18, make_policy(config))
    for name in ("anchors", "assignment", "log_bias", "embeds"):
        assert torch.equal(getattr(found, name), getattr(whole, name))


def test_what_a_policy_drops_stays_dropped(
    tokens: VisualTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dropping(uniform.Policy):
        def assign(self, tokens: VisualTokens, anchors: torch.Tensor) -> Clusters:
            rows = torch.full((tokens.segments, tokens.n), -1)
            kept = torch.arange(anchors.shape[1]).expand_as(anchors)
            return Clusters(anchors, rows.scatter(1, anchors, kept))

    monkeypatch.setattr("era_vllm.lab.blocks.make_policy", lambda config: Dropping())
    found = prune_blocks(tokens, EraConfig(max_segment=30), 0.8)
    for row in (0, 1):
        kept = (found.assignment[row] >= 0).nonzero()[:, 0]
        assert torch.equal(kept, found.anchors[row])
        assert found.assignment[row, kept].tolist() == list(range(len(kept)))


@pytest.mark.parametrize("most", [16, 30, 100])
def test_riders_are_averaged_as_their_tokens(tokens: VisualTokens, most: int) -> None:
    config = EraConfig(policy="dpp", max_segment=most)
    with_riders = replace(tokens, riders=torch.cat([2 * tokens.embeds, tokens.embeds], -1))
    found = prune_blocks(with_riders, config, 0.8)
    plain = prune_blocks(tokens, config, 0.8)
    assert torch.equal(found.anchors, plain.anchors) and torch.equal(found.embeds, plain.embeds)
    assert found.riders is not None and plain.riders is None
    assert torch.equal(found.riders, torch.cat([2 * found.embeds, found.embeds], -1))
