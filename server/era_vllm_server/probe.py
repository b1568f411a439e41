"""What the server itself asks of the engine: requests, as a client's are, and of its workers.

For the warm-up before the socket is served, ``/v1/era/inspect``, ``/ready`` and ``/metrics``.
Leaves out what clients send in a chat (their routes do that).
"""

import uuid
from collections.abc import AsyncGenerator
from typing import Any, Final

from starlette.datastructures import State
from vllm import SamplingParams
from vllm.engine.protocol import EngineClient
from vllm.inputs import EngineInput
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.utils.import_utils import resolve_obj_by_qualname

from era_vllm.vllm_plugin.families import modalities_of
from era_vllm.vllm_plugin.requests import request_context
from era_vllm.vllm_plugin.worker import EraWorker

_TEXT: Final = "USER: {item} ASSISTANT:"


def modalities(state: State) -> tuple[str, ...]:
    """Return what a request may hold: what the family takes, this checkpoint too, and is allowed.

    A checkpoint may lack the token of a modality, and --limit-mm-per-prompt may be 0.
    """
    config = state.vllm_config.model_config
    known = modalities_of(config.hf_config)
    if config.multimodal_config is None:
        return known
    limits = state.engine_client.renderer.get_mm_processor().info.allowed_mm_limits
    return tuple(name for name in known if limits.get(name, 0))


def takes_images(engine: EngineClient) -> bool:
    """Whether a request may hold an image (a stock engine may serve any model)."""
    limits = engine.model_config.multimodal_config
    return limits is not None and limits.get_limit_per_prompt("image") > 0


async def render(
    engine: EngineClient,
    item: object | None,
    rate: float | None,
    modality: str = "image",
    question: str = "",
) -> EngineInput:
    """Return a prompt about one item, or none, ready for the engine.

    The item has an identity of its own, so that no cache answers for it.

    Args:
        item: What vLLM's connector gives.
        rate: Pruning rate; None for a stock engine.
        question: For which it is pruned, where the engine prunes for any.

    Raises:
        VLLMValidationError: the item cannot be taken.
    """
    prompt: dict[str, object] = {"prompt": _TEXT.format(item="")}
    if item is not None:
        builder = engine.renderer.get_mm_processor().dummy_inputs
        prompt = {
            "prompt": _TEXT.format(item=builder.get_dummy_text({modality: 1})),
            "multi_modal_data": {modality: [item]},
            "multi_modal_uuids": {modality: [f"era-{uuid.uuid4().hex}"]},
        }
    parsed = parse_model_prompt(engine.model_config, prompt)
    with request_context() as request:  # its own: no client's field holds, nothing is counted
        request.rates = {} if rate is None else {modality: rate}
        request.questions = {modality: [question]}
        (rendered,) = await engine.renderer.render_cmpl_async([parsed])
    return rendered


def generate(
    engine: EngineClient, prompt: EngineInput, request_id: str, max_tokens: int
) -> AsyncGenerator[RequestOutput, None]:
    """Answer greedily for exactly so many tokens; closing the generator ends the request."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return engine.generate(prompt, params, request_id)


def workers_answer(engine: EngineClient) -> bool:
    """Whether the workers know our questions (``vllm_plugin/worker.py``).

    They do not in a stock engine, nor where a user's own ``--worker-extension-cls`` took the place
    of ours; one that inherits from ``EraWorker`` is fine.
    """
    name = engine.vllm_config.parallel_config.worker_extension_cls
    return bool(name) and issubclass(resolve_obj_by_qualname(name), EraWorker)


async def call_workers(engine: EngineClient, method: str, *arguments: object) -> list[list[Any]]:
    """Return what every worker's method answers, given plain values: [engine][rank].

    They answer between two steps. ``EngineClient.collective_rpc`` would do, but drops the answers
    of all engines but the first where there are several (data parallel).

    Raises:
        EngineDeadError: there is no engine any more.
    """
    return await engine.engine_core.call_utility_all_async(
        "collective_rpc", method, None, arguments, None
    )
