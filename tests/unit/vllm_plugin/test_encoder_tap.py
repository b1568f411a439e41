"""What the tap reads, and what it leaves alone: a tower that somebody else runs."""

import gc
import weakref

import pytest
import torch
from torch import nn

from era_vllm.contracts import TappedLayer
from era_vllm.steps.received_attention import received_attention
from era_vllm.types import Signal

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

HEADS, SIZE, TOKENS = 2, 4, 7


class Attention(nn.Module):
    """As much of a tower's attention as the tap asks for."""

    num_heads, head_size, scale = HEADS, SIZE, SIZE**-0.5

    def forward(self, q, k, v):
        return v


@pytest.fixture
def tower():
    return Attention()


@pytest.fixture
def tap(tower):
    from era_vllm.vllm_plugin.encoder_tap import EncoderTap

    return EncoderTap(TappedLayer(tower, HEADS, 1), frozenset({Signal.ENCODER_ATTENTION}), "all")


def qkv(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, TOKENS, HEADS * SIZE, generator=generator) for _ in range(3)]


def expected(*parts):
    read = []
    for q, k, _ in parts:
        wide = (x.unflatten(-1, (HEADS, SIZE)) for x in (q, k))
        read.append(received_attention(*wide, SIZE**-0.5, "all")[..., 1:])
    return torch.cat(read)


def test_only_what_passes_within_is_read(tower, tap):
    ours, more, foreign = qkv(0), qkv(1), qkv(2)
    tower(*foreign)
    with tap.reading():
        tower(*ours)
        tower(*more)
    tower(*foreign)
    assert torch.equal(tap.take(Signal.ENCODER_ATTENTION), expected(ours, more))
    assert tap.take(Signal.ENCODER_SCORES) is None


def test_a_tower_that_others_run_leaves_nothing(tower, tap, monkeypatch):
    from era_vllm.vllm_plugin import encoder_tap

    made = []

    def compute(*arguments):
        result = received_attention(*arguments)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(encoder_tap, "received_attention", compute)
    with tap.reading():
        tower(*qkv(0))
    tap.take(Signal.ENCODER_ATTENTION)
    for seed in range(100):
        tower(*qkv(seed))
    gc.collect()
    assert len(made) == 1 and made[0]() is None


def test_what_a_failed_pass_read_is_forgotten(tower, tap):
    with pytest.raises(RuntimeError, match="out of memory"), tap.reading():
        tower(*qkv(0))
        raise RuntimeError("out of memory")
    assert tap.take(Signal.ENCODER_ATTENTION) is None
    with tap.reading():
        tower(*qkv(1))
    assert torch.equal(tap.take(Signal.ENCODER_ATTENTION), expected(qkv(1)))
