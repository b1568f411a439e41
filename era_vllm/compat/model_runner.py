"""A running request's slots and where its first item stands, out of vLLM's model runner.

Upstream: vllm/v1/worker/gpu_model_runner.py ``GPUModelRunner`` (0.32.0): ``requests`` and
``input_batch`` with its ``req_id_to_index`` and ``block_table``. Runner V2 keeps them otherwise.
Private use: read, between two steps, for ``/v1/era/inspect`` and tests.
Remove when: a runner tells a request's slots.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from era_vllm.errors import CacheError


class Slots(NamedTuple):
    """Of a request's prompt of t tokens."""

    slots: Int[Tensor, "t"]
    is_visual: Bool[Tensor, "t"]
    """True at the tokens of its first item."""


def request_slots(runner: object, request_id: str, block_size: int) -> Slots | None:
    """Return the slots of a running request's prompt.

    Args:
        runner: vLLM's.
        request_id: As given to ``generate``; the engine appends to it.
        block_size: Slots of a block.

    Returns:
        None where it holds no slots: not yet started, preempted or ended.

    Raises:
        CacheError: another model runner.
    """
    batch = getattr(runner, "input_batch", None)
    if batch is None or not hasattr(batch, "req_id_to_index"):
        raise CacheError(
            f"model runner {type(runner).__name__}: reading a request's slots back is only known "
            "for vLLM's model runner V1"
        )
    for name, row in batch.req_id_to_index.items():
        if name == request_id or name.startswith(request_id + "-"):
            request = runner.requests[name]  # type: ignore[attr-defined]
            position = torch.arange(request.num_prompt_tokens)
            is_visual = torch.zeros(len(position), dtype=torch.bool)
            for first, last in request.mm_features[0].mm_position.extract_embeds_range():
                is_visual[first : last + 1] = True
            table = batch.block_table[0].get_cpu_tensor()[row]
            block = table[position // block_size].long()
            return Slots(block * block_size + position % block_size, is_visual)
    return None
