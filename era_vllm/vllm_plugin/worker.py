"""What API servers may ask of a worker: methods that vLLM's ``collective_rpc`` calls by name.

vLLM mixes the class into its own worker (``worker_extension_cls``, set by ``resolve`` where the
user has none), so nothing is patched and nothing but plain values travels. Each call runs between
two steps, on every rank. Leaves out: routes and limits (``server``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import torch
from torch import nn

from era_vllm.compat.model_runner import request_slots
from era_vllm.contracts import PruningPolicy
from era_vllm.errors import CacheError
from era_vllm.vllm_plugin.inspector import Inspector, Watched
from era_vllm.vllm_plugin.metrics import Counted
from era_vllm.vllm_plugin.reducer import Reducer

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from era_vllm.attention.bias_buffer import BiasBuffer


class ReadBack(TypedDict):
    """One rank's biases as they lie in the KV slots of a prompt with one image."""

    layers: int
    kv_heads: int
    log_bias: list[float]
    """The image's slots in the first layer's first KV head."""
    differences: list[float]
    """Of each layer: the largest |read - gamma x log_bias| over KV heads and the image's slots."""
    text_slots: int
    largest_text_bias: float
    """Largest |read| in the prompt's other slots, over layers and KV heads."""


class EraWorker:
    """Mixed into vLLM's worker."""

    model_runner: Any  # vLLM's, V1 or V2
    vllm_config: "VllmConfig"
    era_inspector: Inspector | None = None
    """Made when it is first asked for."""

    def era_metrics(self) -> Counted:
        """Return what this rank counted."""
        return _model(self).reducer.metrics.counted()

    def era_watch(
        self,
        pixel_hash: int,
        num_anchors: list[int],
        seconds: float,
        question: Sequence[int] = (),
    ) -> None:
        """Catch an item when it is pruned."""
        watched = Watched(pixel_hash, tuple(num_anchors), tuple(question))
        _inspector(self).watch(watched, seconds)

    def era_take(
        self,
        pixel_hash: int,
        num_anchors: list[int],
        request_id: str | None,
        question: Sequence[int] = (),
    ) -> dict[str, object]:
        """Return what was caught of an image, and forget it.

        Args:
            pixel_hash, num_anchors, question: As watched for.
            request_id: Of the running request with that image alone, whose KV slots are read too.

        Returns:
            ``pruned``: ``inspector.Found``, or None if it was not pruned since; ``read_back``: this
            rank's ``ReadBack``, or None if not asked for or the request holds no slots;
            ``unreadable``: why the cache cannot be read on this backend, or None.
        """
        watched = Watched(pixel_hash, tuple(num_anchors), tuple(question))
        found = _inspector(self).take(watched)
        read = unreadable = None
        if found is not None and request_id is not None:
            try:
                read = _read_back(self, request_id, found.log_bias)
            except CacheError as error:  # an exception on the way through vLLM is only a text
                unreadable = str(error)
        pruned = None if found is None else asdict(found)
        return {"pruned": pruned, "read_back": read, "unreadable": unreadable}


class _Pruned(Protocol):
    """What is asked of the model (``model_mixin``)."""

    policy: PruningPolicy
    reducer: Reducer
    bias_buffer: "BiasBuffer"

    def modules(self) -> Iterator[nn.Module]: ...


def _model(worker: EraWorker) -> _Pruned:
    return worker.model_runner.get_model()


def _inspector(worker: EraWorker) -> Inspector:
    if worker.era_inspector is None:
        model = _model(worker)
        worker.era_inspector = Inspector(model.policy, model.reducer.listeners)
    return worker.era_inspector


def _read_back(worker: EraWorker, request_id: str, log_bias: list[float]) -> ReadBack | None:
    from era_vllm.attention.cache_reader import read_bias
    from era_vllm.attention.layer import RectifiedAttention

    model, size = _model(worker), worker.vllm_config.cache_config.block_size
    if (found := request_slots(worker.model_runner, request_id, size)) is None:
        return None
    slots, image = found
    layers = [layer for layer in model.modules() if isinstance(layer, RectifiedAttention)]
    read = torch.stack([read_bias(layer, slots, size) for layer in layers])  # [l, t, h]
    gamma = model.bias_buffer.gamma
    exponents = torch.ones(1, 1) if gamma is None else gamma.cpu()
    expected = exponents[:, None] * torch.tensor(log_bias)[None, :, None]
    text = read[:, ~image]
    return {
        "layers": len(layers),
        "kv_heads": read.shape[2],
        "log_bias": read[0, image, 0].tolist(),
        "differences": (read[:, image] - expected).abs().amax((1, 2)).tolist(),
        "text_slots": text.shape[1],
        "largest_text_bias": float(text.abs().max()) if text.numel() else 0.0,
    }
