"""Where vLLM makes an engine's request of a prompt and its sampling parameters.

Upstream: vllm/v1/engine/input_processor.py:350 ``InputProcessor.process_inputs`` (0.32.0): what
every way in comes through (HTTP, ``LLM``, beam search), in the process that has the renderer. It
copies the parameters, and decides ``max_tokens`` where none is given.
Private use: a function that is called with the prompt and the request that was made of it.
Remove when: a renderer or processor may say how much can be generated behind a prompt.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Final

from vllm.inputs import EngineInput
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

_SIGNATURE: Final = inspect.signature(InputProcessor.process_inputs)


def then(call: Callable[[EngineInput, EngineCoreRequest], None]) -> None:
    """Have a function called with every prompt and its request, before the engine gets it.

    In this process, once however often it is said; a stock engine's process never says it.
    """
    process: Callable[..., EngineCoreRequest] = InputProcessor.process_inputs
    if getattr(process, "_called_after", None) is call:
        return

    @wraps(process)
    def processing(*arguments: Any, **named: Any) -> EngineCoreRequest:  # noqa: ANN401  # vLLM's
        bound = _SIGNATURE.bind(*arguments, **named)
        prompt = bound.arguments["prompt"]
        if not (isinstance(prompt, dict) and "type" in prompt):
            prompt = _rendered(**bound.arguments)
            bound.arguments["prompt"] = prompt
        request = process(*bound.args, **bound.kwargs)
        call(prompt, request)
        return request

    processing._called_after = call  # type: ignore[attr-defined]
    InputProcessor.process_inputs = processing


def _rendered(
    self: InputProcessor,
    prompt: Any,  # noqa: ANN401  # as many forms as vLLM takes
    tokenization_kwargs: dict[str, Any] | None = None,
    **_: object,
) -> EngineInput:
    """Render what is no engine's input yet, as vLLM would within (:408, deprecated there)."""
    options = self.renderer.default_cmpl_tok_params.with_kwargs(**(tokenization_kwargs or {}))
    (rendered,) = self.renderer.render_cmpl(
        [parse_model_prompt(self.model_config, prompt)], options
    )
    return rendered
