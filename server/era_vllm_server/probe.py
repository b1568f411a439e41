"""Requests of the server's own: through renderer, engine and back, as a client's are.

For the warm-up before the socket is served, and for ``/v1/era/inspect``. Leaves out what clients
send in a chat (their routes do that).
"""

import uuid
from collections.abc import AsyncGenerator
from typing import Final

from PIL.Image import Image
from vllm import SamplingParams
from vllm.engine.protocol import EngineClient
from vllm.inputs import EngineInput
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import parse_model_prompt

from era_vllm.vllm_plugin.requests import request_context

_TEXT: Final = "USER: {image} ASSISTANT:"


def takes_images(engine: EngineClient) -> bool:
    """Whether a request may hold an image (a stock engine may serve any model)."""
    limits = engine.model_config.multimodal_config
    return limits is not None and limits.get_limit_per_prompt("image") > 0


async def render(engine: EngineClient, image: Image | None, rate: float | None) -> EngineInput:
    """Return a prompt about one image, or none, ready for the engine.

    The image has an identity of its own, so that no cache answers for it.

    Args:
        engine: The API server's client.
        image: RGB.
        rate: Pruning rate; None for a stock engine.

    Raises:
        VLLMValidationError: the image cannot be taken.
    """
    prompt: dict[str, object] = {"prompt": _TEXT.format(image="")}
    if image is not None:
        builder = engine.renderer.get_mm_processor().dummy_inputs
        prompt = {
            "prompt": _TEXT.format(image=builder.get_dummy_text({"image": 1})),
            "multi_modal_data": {"image": image},
            "multi_modal_uuids": {"image": [f"era-{uuid.uuid4().hex}"]},
        }
    parsed = parse_model_prompt(engine.model_config, prompt)
    with (
        request_context() as request
    ):  # of its own: no client's field holds here, and nothing is counted
        request.rates = {} if rate is None else {"image": rate}
        (rendered,) = await engine.renderer.render_cmpl_async([parsed])
    return rendered


def generate(
    engine: EngineClient, prompt: EngineInput, request_id: str, max_tokens: int
) -> AsyncGenerator[RequestOutput, None]:
    """Answer greedily for exactly so many tokens; closing the generator ends the request."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return engine.generate(prompt, params, request_id)
