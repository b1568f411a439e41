"""A small real engine in this process, asked about one picture: the live half of the check.

float32 and eager, with a KV cache just large enough, so that it starts in seconds and can be
compared with plain transformers. vLLM reads its environment as it is imported, so ``doctor.py``
imports this module after setting it. Leaves out the comparison (``lab/check.py``).
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

import torch
from PIL.Image import Image
from vllm import LLM, SamplingParams

from era_vllm.attention.layer import RectifiedAttention
from era_vllm.errors import UnsupportedError
from era_vllm.lab.check import EngineAnswer
from era_vllm.lab.oracle import segments_of
from era_vllm.types import PrunedTokens

ANSWER_TOKENS: Final = 9
"""The token after the prompt and 8 decode steps."""
_SPARE_TOKENS: Final = 256  # of the context, beside the picture
_CACHES: Final = 4  # contexts that the KV cache holds


@dataclass(frozen=True, slots=True)
class Built:
    """What the engine's language model was built with."""

    layers: int
    head_size: int
    backend: str


def live_answer(
    engine_args: Mapping[str, object],
    image: Image,
    question: str,
    rate: float,
    image_tokens: int,
    bytes_per_token: int,
) -> tuple[EngineAnswer, Built]:
    """Start an engine, ask it about one picture, and stop it.

    Args:
        engine_args: What switches pruning on (``era_vllm.engine_args``).
        image: One picture.
        question: About it; the prompt is LLaVA's.
        rate: Pruning rate of the picture.
        image_tokens: N.
        bytes_per_token: Of the KV cache.

    Raises:
        UnsupportedError: the engine pruned nothing.
    """
    context = image_tokens + _SPARE_TOKENS
    llm = LLM(
        **engine_args,
        dtype="float32",
        enforce_eager=True,
        max_model_len=context,
        max_num_batched_tokens=max(context, 1024),
        max_num_seqs=2,
        max_logprobs=-1,
        limit_mm_per_prompt={"image": 1},
        kv_cache_memory_bytes=max(_CACHES * context * bytes_per_token, 32 << 20),
    )
    taken: list[PrunedTokens] = []

    def listen(model: torch.nn.Module) -> Built:
        model.listeners.append(lambda tokens, pruned: taken.append(_on_cpu(pruned)))
        layers = [part for part in model.modules() if isinstance(part, RectifiedAttention)]
        return Built(len(layers), layers[0].head_size, layers[0].attn_backend.get_name())

    try:
        (built,) = llm.apply_model(listen)
        prompt = {
            "prompt": f"USER: <image>\n{question} ASSISTANT:",
            "multi_modal_data": {"image": image},
            "mm_processor_kwargs": {"era": [rate]},
        }
        sampling = SamplingParams(
            max_tokens=ANSWER_TOKENS, temperature=0, logprobs=-1, ignore_eos=True
        )
        (output,) = llm.generate([prompt], sampling, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    if not taken:
        raise UnsupportedError(
            "the engine answered without pruning the picture; needed one call of the pruning "
            "step; check the 'architecture' and 'plugin' lines above"
        )
    completion = output.outputs[0]
    steps = completion.logprobs
    rows = [[step[token].logprob for token in range(len(step))] for step in steps]
    answer = EngineAnswer(
        token_ids=[*output.prompt_token_ids, *completion.token_ids[:-1]],
        log_probs=torch.tensor(rows),
        segment=segments_of(taken[0])[0],
    )
    return answer, built


def _on_cpu(pruned: PrunedTokens) -> PrunedTokens:
    """Copy to where the oracle is."""
    return PrunedTokens(*(getattr(pruned, field.name).cpu() for field in fields(pruned)))
