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
