"""Reads attention out of one layer of a vision tower while it runs: no second pass, no patch.

A forward pre-hook on the layer's attention sees its queries and keys. Under tensor parallelism
each rank holds some heads; the results are gathered, so that every rank chooses the same anchors.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)

from era_vllm.contracts import ModelAdapter, TappedLayer
from era_vllm.steps.received_attention import mean_scores, received_attention
from era_vllm.types import Signal
from era_vllm.vllm_plugin.fields import Planned


class EncoderProbe:
    """Signals of what passes the tower between ``before`` and ``after``; deaf at other times."""

    def __init__(
        self,
        layer: TappedLayer,
        signals: frozenset[Signal],
        queries: Literal["all", "cls"],
        adapter: ModelAdapter,
        hf_config: object,
    ) -> None:
        """Hook a layer.

        Args:
            layer: Where to read.
            signals: What to compute; attention, its scores, or both.
            queries: Queries that are averaged over.
            adapter, hf_config: Of the family, which knows where a key's token stands.
        """
        self.gives = signals
        self._layer = layer
        self._queries: Literal["all", "cls"] = queries
        self._adapter, self._hf_config = adapter, hf_config
        self._read: dict[Signal, list[Tensor]] | None = None
        self._units: list[tuple[int, int]] = []
        layer.attention.register_forward_pre_hook(self._on_call, with_kwargs=True)

    def before(self, items: Sequence[Planned]) -> None:
        """Listen, from nothing."""
        self._read = {signal: [] for signal in self.gives}
        if (keys := self._layer.keys) is not None:
            layouts = [item.plan.layout for item in items]
            self._units = [(layout.units, keys(layout)) for layout in layouts]

    def after(self, items: Sequence[Planned]) -> Mapping[Signal, Sequence[Tensor]]:
        """Return what was read, at the items' places."""
        assert self._read is not None, "after without before"
        read, self._read = self._read, None
        layouts = [item.plan.layout for item in items]
        together = torch.cat if self._layer.keys is None else list
        return {
            signal: self._adapter.signals(self._hf_config, together(parts), layouts)
            for signal, parts in read.items()
        }

    def _on_call(
        self, attention: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]
    ) -> None:
        if self._read is None:
            return
        named = (*args, *(kwargs[name] for name in ("query", "key")[len(args) :]))[:2]
        shape = attention.num_heads, attention.head_size
        query, key = (x.reshape(*x.shape[:2], *shape) for x in named)
        for signal, parts in self._read.items():
            compute = received_attention if signal == Signal.ENCODER_ATTENTION else mean_scores
            of_items = [
                compute(*one, attention.scale, self._queries) for one in self._items(query, key)
            ]
            if self._layer.keys is None:
                (only,) = of_items
                parts.append(self._all_heads(only)[..., self._layer.skipped_keys :])
                continue
            # [u, h, m] of each item -> one sequence, so that ranks gather once
            in_one = torch.cat([x.transpose(0, 1).flatten(1) for x in of_items], 1)
            counts = [keys for units, keys in self._units for _ in range(units)]
            parts += self._all_heads(in_one[None])[0].split(counts, 1)

    def _items(self, query: Tensor, key: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield queries and keys of units of one size, [u, m, h, dh]."""
        if self._layer.keys is None:
            yield query, key
            return
        first = 0
        for units, keys in self._units:
            share = slice(first, first := first + units * keys)
            yield (
                query[0, share].unflatten(0, (units, keys)),
                key[0, share].unflatten(0, (units, keys)),
            )

    def _all_heads(self, x: Float[Tensor, "u h m"]) -> Float[Tensor, "u hv m"]:
        if x.shape[1] == self._layer.heads or get_tensor_model_parallel_world_size() == 1:
            return x
        return tensor_model_parallel_all_gather(x, dim=1)
