"""What the probe reads, and what it leaves alone: a tower that somebody else runs."""

import gc
import weakref

import pytest
import torch
from torch import nn

from era_vllm.contracts import ModelAdapter, TappedLayer
from era_vllm.steps.received_attention import received_attention
from era_vllm.types import Signal

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

HEADS, SIZE, TOKENS = 2, 4, 7


class Attention(nn.Module):
    """As much of a tower's attention as the probe asks for."""

    num_heads, head_size, scale = HEADS, SIZE, SIZE**-0.5

    def forward(self, q, k, v):
        return v


@pytest.fixture
def tower():
    return Attention()


class Tiles(ModelAdapter):
    """A unit is an item."""


@pytest.fixture
def probe(tower):
    from era_vllm.vllm_plugin.signals.encoder_probe import EncoderProbe

    layer = TappedLayer(tower, HEADS, 1)
    return EncoderProbe(layer, frozenset({Signal.ENCODER_ATTENTION}), "all", Tiles(), None)


def qkv(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, TOKENS, HEADS * SIZE, generator=generator) for _ in range(3)]


def expected(*parts):
    read = []
    for q, k, _ in parts:
        wide = (x.unflatten(-1, (HEADS, SIZE)) for x in (q, k))
        read.append(received_attention(*wide, SIZE**-0.5, "all")[..., 1:])
    return torch.cat(read)


def read(probe):
    """What a pass of some items gives."""
    found = probe.after((), ())
    assert found.keys() == {Signal.ENCODER_ATTENTION}
    return torch.stack(list(found[Signal.ENCODER_ATTENTION]))


def test_only_what_passes_within_is_read(tower, probe):
    ours, more, foreign = qkv(0), qkv(1), qkv(2)
    tower(*foreign)
    probe.before(())
    tower(*ours)
    tower(*more)
    found = read(probe)
    assert torch.equal(found, expected(ours, more))
    tower(*foreign)
    probe.before(())
    tower(*more)
    assert torch.equal(read(probe), expected(more))


def test_a_tower_that_others_run_leaves_nothing(tower, probe, monkeypatch):
    from era_vllm.vllm_plugin.signals import encoder_probe

    made = []

    def compute(*arguments):
        result = received_attention(*arguments)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(encoder_probe, "received_attention", compute)
    probe.before(())
    tower(*qkv(0))
    read(probe)
    for seed in range(100):
        tower(*qkv(seed))
    gc.collect()
    assert len(made) == 1 and made[0]() is None


def test_what_a_failed_pass_read_is_forgotten(tower, probe):
    probe.before(())
    tower(*qkv(0))  # and then an exception, so that nobody asks
    probe.before(())
    tower(*qkv(1))
    assert torch.equal(read(probe), expected(qkv(1)))


def test_keys_and_class_attention_by_hand(tower):
    """Key of each token and head; attention of the first row alone, whatever the queries are."""
    from era_vllm.vllm_plugin.signals.encoder_probe import EncoderProbe

    wanted = frozenset({Signal.ENCODER_KEYS, Signal.CLASS_ATTENTION})
    probe = EncoderProbe(TappedLayer(tower, HEADS, 1), wanted, "all", Tiles(), None)
    query, key, value = qkv(3)
    probe.before(())
    tower(query, key, value)
    key.fill_(torch.nan)  # what a tower does with its tensors later
    found, (query, key, _) = probe.after((), ()), qkv(3)
    for unit in range(2):
        keys = found[Signal.ENCODER_KEYS][unit]
        assert keys.shape == (HEADS, SIZE, TOKENS - 1)
        for head in range(HEADS):
            own = slice(head * SIZE, (head + 1) * SIZE)
            assert torch.equal(keys[head].T, key[unit, 1:, own])
            scores = key[unit, :, own] @ query[unit, 0, own] * SIZE**-0.5
            attention = found[Signal.CLASS_ATTENTION][unit][head]
            assert torch.allclose(attention, scores.softmax(0)[1:], atol=1e-6)


def test_without_a_class_token_all_queries_are_averaged(tower):
    from era_vllm.vllm_plugin.signals.encoder_probe import EncoderProbe

    wanted = frozenset({Signal.ENCODER_ATTENTION, Signal.CLASS_ATTENTION})
    probe = EncoderProbe(TappedLayer(tower, HEADS, 0), wanted, "all", Tiles(), None)
    probe.before(())
    tower(*qkv(3))
    found = probe.after((), ())
    assert torch.equal(*(torch.stack(list(found[signal])) for signal in wanted))
