"""What the scout's layers come out with, and what rides behind a row for it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from era_vllm.layout import one_grid
from era_vllm.plan import Plan
from era_vllm.vllm_plugin.fields import Planned
from era_vllm.vllm_plugin.injection import InjectedStates, inject, split_states, with_states

K, D = 2, 3
VISUAL = torch.tensor([False, True, True, False, True])


class Layer(nn.Module):
    """A layer as vLLM calls it."""

    def forward(self, positions, hidden_states, residual):
        return hidden_states + 1, residual + positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_visual_tokens_of_pruned_items_come_out_with_their_states(dtype):
    buffer = InjectedStates(8, K, D, dtype)
    layers = [Layer(), Layer(), Layer()]
    inject(layers[:K], buffer)
    assert [type(layer).__name__ for layer in layers] == ["InjectedLayer"] * 2 + ["Layer"]
    hidden, residual = torch.ones(5, D, dtype=dtype), torch.ones(5, D, dtype=dtype)
    plain = 2 * torch.ones(5, D, dtype=dtype), 3 * torch.ones(5, D, dtype=dtype)
    columns = torch.randn(3, K * D + 1).to(dtype)
    columns[:, -1] = torch.tensor([1.0, 0.0, 0.996])
    buffer.write(VISUAL, columns)
    for level, layer in enumerate(layers):
        out, left = layer(2, hidden, residual)
        for token, row in ((1, 0), (4, 2)) if level < K else ():
            expected = columns[row, level * D : level * D + D]
            assert torch.equal(out[token] + left[token], expected)
        others = [0, 2, 3] if level < K else range(5)
        for token in others:
            assert torch.equal(out[token], plain[0][token])
            assert torch.equal(left[token], plain[1][token])
    buffer.write(VISUAL[:2], columns[:1])
    assert buffer.mask[:, 0].tolist() == [False, True, *[False] * 6]
    buffer.clear()
    assert not buffer.mask.any()
    assert torch.equal(layers[0](2, hidden, residual)[0], plain[0])


@pytest.mark.parametrize(("kept", "pruned"), [(3, True), (4, False)])
def test_states_ride_behind_the_rows(kept, pruned):
    item = Planned(Plan(one_grid(2, 2, ()), (kept,)), 0)
    rows, states = torch.randn(4, D), torch.randn(K * D, 4)
    (wide,) = with_states([item], [rows], [states])
    assert wide.shape == (4, D + K * D + 1) and (wide[:, -1] == pruned).all()
    own, found = split_states(wide, K, D)
    assert torch.equal(own, rows)
    assert (found is not None) == pruned
    if pruned:
        assert torch.equal(found.flatten(1), states.T)
    assert split_states(rows, 0, D)[1] is None


def test_a_step_without_injection_has_no_columns():
    from era_vllm.vllm_plugin.step_state import StepState

    bias = SimpleNamespace(columns=torch.zeros(8, 1, 1, 1), write=lambda *_: None)
    state = StepState.__new__(StepState)
    nn.Module.__init__(state)
    state.bias_buffer, state.anchor_offsets = bias, SimpleNamespace(write=lambda *_: None)
    state.injected, state._axes = None, 1
    packed = torch.randn(3, D + 5)
    packed[:, -2:] = 0
    (rows,) = state.write([packed], VISUAL)
    assert torch.equal(rows, packed[:, :D])
