"""Reads one layer of a vision tower while it runs: no second pass, no patch.

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
            signals: What to compute, of ``OF_ENCODER``.
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

    def after(
        self, items: Sequence[Planned], rows: Sequence[Tensor]
    ) -> Mapping[Signal, Sequence[Tensor]]:
        """Return what was read, at the items' places."""
        assert self._read is not None, "after without before"
        read, self._read = self._read, None
        layouts = [item.plan.layout for item in items]
        together = torch.cat if self._layer.keys is None else list
        found = {
            signal: self._adapter.signals(self._hf_config, together(parts), layouts)
            for signal, parts in read.items()
        }
        if (keys := found.get(Signal.ENCODER_KEYS)) is not None:
            by_head = (self._layer.heads, -1)
            found[Signal.ENCODER_KEYS] = [one.unflatten(0, by_head) for one in keys]
        return found

    def _on_call(
        self, attention: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]
    ) -> None:
        if self._read is None:
            return
        named = (*args, *(kwargs[name] for name in ("query", "key")[len(args) :]))[:2]
        shape = attention.num_heads, attention.head_size
        query, key = (x.reshape(*x.shape[:2], *shape) for x in named)
        for signal, parts in self._read.items():
            of_items = [
                self._computed(signal, *one, attention.scale) for one in self._items(query, key)
            ]
            if self._layer.keys is None:
                (only,) = of_items
                parts.append(self._all_heads(only)[..., self._layer.skipped_keys :])
                continue
            # [u, c, m] of each item -> one sequence, so that ranks gather once
            in_one = torch.cat([x.transpose(0, 1).flatten(1) for x in of_items], 1)
            counts = [keys for units, keys in self._units for _ in range(units)]
            parts += self._all_heads(in_one[None])[0].split(counts, 1)

    def _computed(
        self, signal: Signal, query: Tensor, key: Tensor, scale: float
    ) -> Float[Tensor, "u c m"]:
        """Return a signal of this rank's heads: one channel a head, or its ``head_size``."""
        if signal is Signal.ENCODER_KEYS:
            return key.permute(0, 2, 3, 1).flatten(1, 2).to(torch.float32, copy=True)
        if signal is Signal.ENCODER_SCORES:
            return mean_scores(query, key, scale, self._queries)
        queries = self._queries
        if signal is Signal.CLASS_ATTENTION:
            queries = "cls" if self._layer.skipped_keys else "all"
        return received_attention(query, key, scale, queries)

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

    def _all_heads(self, x: Float[Tensor, "u c m"]) -> Float[Tensor, "u all m"]:
        whole = self._layer.attention.num_heads == self._layer.heads
        if whole or get_tensor_model_parallel_world_size() == 1:
            return x
        return tensor_model_parallel_all_gather(x, dim=1)
