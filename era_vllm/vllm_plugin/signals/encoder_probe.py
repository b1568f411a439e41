"""Reads attention out of one layer of a vision tower while it runs: no second pass, no patch.

A forward pre-hook on the layer's attention sees its queries and keys. Under tensor parallelism
each rank holds some heads; the results are gathered, so that every rank chooses the same anchors.
"""

from collections.abc import Mapping, Sequence
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
        layer.attention.register_forward_pre_hook(self._on_call)

    def before(self, items: Sequence[Planned]) -> None:
        """Listen, from nothing."""
        self._read = {signal: [] for signal in self.gives}

    def after(self, items: Sequence[Planned]) -> Mapping[Signal, Sequence[Tensor]]:
        """Return what was read, at the items' places."""
        assert self._read is not None, "after without before"
        read, self._read = self._read, None
        layouts = [item.plan.layout for item in items]
        return {
            signal: self._adapter.signals(self._hf_config, torch.cat(parts), layouts)
            for signal, parts in read.items()
        }

    def _on_call(self, attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._read is None:
            return
        heads, size = attention.num_heads, attention.head_size
        query, key = (x.unflatten(-1, (heads, size)) for x in inputs[:2])
        for signal, parts in self._read.items():
            compute = received_attention if signal == Signal.ENCODER_ATTENTION else mean_scores
            result = compute(query, key, attention.scale, self._queries)
            parts.append(self._all_heads(result)[..., self._layer.skipped_keys :])

    def _all_heads(self, x: Float[Tensor, "u h m"]) -> Float[Tensor, "u hv m"]:
        if x.shape[1] == self._layer.heads or get_tensor_model_parallel_world_size() == 1:
            return x
        return tensor_model_parallel_all_gather(x, dim=1)
