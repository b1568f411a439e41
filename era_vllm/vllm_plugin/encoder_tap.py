"""Reads attention out of one layer of a vision tower while it runs: no second pass, no patch.

A forward pre-hook on the layer's attention sees its queries and keys, and reads them only within
``reading``: whoever else runs the tower (warm-ups, graph captures) leaves nothing behind. Under
tensor parallelism each rank holds some heads; the results are gathered, so that every rank chooses
the same anchors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)

from era_vllm.contracts import TappedLayer
from era_vllm.steps.received_attention import mean_scores, received_attention
from era_vllm.types import Signal


class EncoderTap:
    """Signals of the images that pass the tower within ``reading``."""

    def __init__(
        self,
        layer: TappedLayer,
        signals: frozenset[Signal],
        queries: Literal["all", "cls"],
    ) -> None:
        """Hook a layer, if there is anything to compute.

        Args:
            layer: Where to read.
            signals: What to compute.
            queries: Queries that are averaged over.
        """
        self._layer = layer
        self._signals = signals
        self._queries: Literal["all", "cls"] = queries
        self._taken: dict[Signal, list[Tensor]] = {}
        self._reading = False
        if signals:
            layer.attention.register_forward_pre_hook(self._read)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read what passes the tower within; what is read of a pass that fails is forgotten."""
        self._taken = {signal: [] for signal in self._signals}
        self._reading = True
        try:
            yield
        except BaseException:
            self._taken.clear()
            raise
        finally:
            self._reading = False

    def take(self, signal: Signal) -> Float32[Tensor, "s hv n"] | None:
        """Return what was read, and forget it; None if the signal is not computed."""
        parts = self._taken.pop(signal, None)
        return None if parts is None else torch.cat(parts)

    def _read(self, attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self._reading:
            return
        heads, size = attention.num_heads, attention.head_size
        query, key = (x.unflatten(-1, (heads, size)) for x in inputs[:2])
        for signal in self._signals:
            compute = received_attention if signal == Signal.ENCODER_ATTENTION else mean_scores
            result = compute(query, key, attention.scale, self._queries)
            self._taken[signal].append(self._all_heads(result)[..., self._layer.skipped_keys :])

    def _all_heads(self, x: Float[Tensor, "s h n"]) -> Float[Tensor, "s hv n"]:
        if x.shape[1] == self._layer.heads or get_tensor_model_parallel_world_size() == 1:
            return x
        return tensor_model_parallel_all_gather(x, dim=1)
