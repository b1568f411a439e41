"""Injection: anchors enter the scout's layers with the mean of their cluster's states there.

A merged token goes through the first layers as one among few; its cluster's tokens went through
them among all. So what comes out of each of the scout's layers is replaced, for visual tokens, by
the cluster means of what came out for the picture alone. The states ride behind the encoder's rows
through the reducer and vLLM's encoder cache, and stand at fixed addresses for the step, as the bias
does. Items of which nothing is pruned are left alone.

    [vLLM's row | states of layer 1 ... k | 1 where the item is pruned, else 0]

Leaves out where the states come from (``signals/scout.py``).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from era_vllm.vllm_plugin.fields import Planned

_HALF: Final = 0.5
"""Of the last column: a mean of ones may be a last bit off."""


class InjectedStates(nn.Module):
    """What one step's visual tokens come out of the first layers with."""

    states: Tensor
    """[k, rows, d], model dtype."""
    mask: Tensor
    """[rows, 1] bool: where they are."""

    def __init__(self, rows: int, layers: int, width: int, dtype: torch.dtype) -> None:
        """Make buffers.

        Args:
            rows: Tokens of a step, at most.
            layers: k.
            width: d, the language model's.
        """
        super().__init__()
        states = torch.zeros(layers, rows, width, dtype=dtype)
        self.register_buffer("states", states, persistent=False)
        self.register_buffer("mask", torch.zeros(rows, 1, dtype=torch.bool), persistent=False)
        self._dirty = False

    @property
    def columns(self) -> int:
        """Columns that ride behind a row."""
        return self.states.shape[0] * self.states.shape[2] + 1

    def clear(self) -> None:
        """Have nothing replaced; free on steps that follow a step without images."""
        if self._dirty:
            self.mask.zero_()
            self._dirty = False

    def write(self, is_visual: Bool[Tensor, "t"], columns: Float[Tensor, "v c"]) -> None:
        """Set the step's states. Mutates: states, mask.

        Args:
            is_visual: True at the v tokens of the step that are visual.
            columns: Theirs, in the order of the tokens.
        """
        layers, _, width = self.states.shape
        visual = is_visual.to(self.mask.device, non_blocking=True)
        # How many they are is known here, so that no device has to say where they are; a masked
        # scatter would hold a sum of int64 for each number of the states of the whole step.
        places = visual.logical_not().argsort(stable=True)[: len(columns)]
        self.mask.zero_()
        pruned = columns[:, -1:] > _HALF
        self.mask.index_copy_(0, places, pruned & visual[places, None])
        values = columns[:, :-1].unflatten(1, (layers, width)).transpose(0, 1)
        self.states.index_copy_(1, places, values.to(self.states.dtype))
        self._dirty = True

    def into(self, level: int, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's output with those states in place: their sum is what the next reads.

        Args:
            level: The layer, from 0.
            hidden, residual: [t, d].
        """
        tokens = hidden.shape[0]
        mask, states = self.mask[:tokens], self.states[level, :tokens]
        return hidden.masked_fill(mask, 0.0), torch.where(mask, states, residual)


class _Injected:
    """Mixed in before the class of a decoder layer."""

    injection: InjectedStates
    injection_level: int

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Do what the layer does, and replace what came out."""
        hidden, residual = super().forward(*args, **kwargs)  # type: ignore[misc]
        return self.injection.into(self.injection_level, hidden, residual)


@cache
def _injected(layer: type) -> type:
    return type(f"Injected{layer.__name__}", (_Injected, layer), {})


def inject(layers: Sequence[nn.Module], states: InjectedStates) -> None:
    """Have each layer's output replaced; call at the end of a model's __init__.

    Its names, weights and place stay: only its class is another. Mutates: layers.
    """
    for level, layer in enumerate(layers):
        layer.__class__ = _injected(type(layer))
        layer.injection, layer.injection_level = states, level  # type: ignore[assignment]


def split_states(rows: Tensor, layers: int, width: int) -> tuple[Tensor, Tensor | None]:
    """Return an item's rows and its states [a, k, d], float32; None where none are injected.

    Args:
        rows: As they were packed.
        layers, width: k and d; k = 0: without injection.
    """
    if not layers:
        return rows.float(), None
    behind = layers * width
    own, states, pruned = rows.float().split([rows.shape[1] - behind - 1, behind, 1], 1)
    return own, states.unflatten(1, (layers, width)) if pruned[0] > _HALF else None


def with_states(
    items: Sequence[Planned], rows: Sequence[Tensor], states: Sequence[Tensor]
) -> list[Tensor]:
    """Return each item's rows with its states behind them.

    Args:
        rows: [length, d + r] of each.
        states: [k d, length] of each.
    """
    done: list[Tensor] = []
    for item, own, of_layers in zip(items, rows, states, strict=True):
        plan = item.plan
        counts = zip(plan.layout.segments, plan.num_anchors, strict=True)
        pruned = any(count < segment.n for segment, count in counts)
        flag = torch.full_like(own[:, :1], float(pruned))
        done.append(torch.cat([own, of_layers.T.to(own.dtype), flag], -1))
    return done
