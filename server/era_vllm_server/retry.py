"""Gives the engine a request again that failed through no fault of its own, unseen by its client.

vLLM keeps pictures twice: the API server remembers what it has sent, the engine what it has got. A
request that is refused, shed or given up after its pictures were processed leaves the first ahead
of the second; the next request with such a picture, somebody else's perhaps, is sent without its
pixels and ends as an internal error. vLLM then forgets the picture and counts on the client to ask
again. We do so instead: the prompt is rendered anew, with pixels this time. A 503 alone would not
serve as well: a stream has begun by then, and no SDK asks again after an error within one.

Where it cannot be (beam search makes prompts of its own, large pictures are not kept so long), or
the picture is thrown out by others each time, it is a 503 all the same.

Upstream: vllm/v1/engine/core.py:2001 ``_handle_mm_cache_miss`` (0.32.0), which calls it retryable,
where the chat routes answer 500. Replaces ``generate`` of the API server's engine client, through
which every route goes. Remove when vLLM asks again itself.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Final

from vllm.engine.protocol import EngineClient
from vllm.exceptions import RetryableRequestError
from vllm.inputs import EngineInput
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from era_vllm.vllm_plugin.renderer import RENDER

_RETRIES: Final = 2
"""Between two tries the picture can be thrown out by others."""


def retry_missed_pictures(engine: EngineClient) -> None:
    """Have a request that misses a picture start once more, twice at most.

    Mutates: engine, its ``generate``.
    """
    generate = engine.generate

    def generating(
        prompt: EngineInput, sampling_params: SamplingParams, request_id: str, **options: object
    ) -> AsyncGenerator[RequestOutput, None]:
        render = prompt.pop(RENDER, None) if isinstance(prompt, dict) else None

        def start(rendered: EngineInput) -> AsyncGenerator[RequestOutput, None]:
            return generate(rendered, sampling_params, request_id, **options)

        return _outputs(prompt, start, render) if _counts_on_cache(prompt) else start(prompt)

    engine.generate = generating


async def _outputs(
    prompt: EngineInput,
    start: Callable[[EngineInput], AsyncGenerator[RequestOutput, None]],
    render: Callable[[], Awaitable[EngineInput]] | None,
) -> AsyncGenerator[RequestOutput, None]:
    """Yield a request's outputs, of the last time that it was given to the engine.

    Raises:
        RetryableRequestError: it misses a picture, and is not to be rendered anew; a 503.
    """
    for retries in reversed(range(_RETRIES + 1)):
        begun = False
        async with aclosing(start(prompt)) as outputs:
            async for output in outputs:
                if not begun and _counts_on_cache(prompt) and _failed_at_once(output):
                    break
                begun, render = True, None  # it holds the pictures
                yield output
            else:
                return
        if render is None or not retries:
            break
        prompt = await render()
    raise RetryableRequestError("A picture or video has to be sent again; please retry")


def _counts_on_cache(prompt: object) -> bool:
    """Tell whether a prompt has pictures that the engine was sent before, and no pixels of them."""
    items = prompt.get("mm_kwargs") if isinstance(prompt, dict) else None
    return bool(items) and any(None in of_kind for of_kind in items.values())


def _failed_at_once(output: RequestOutput) -> bool:
    """Tell whether the engine ended a request that had produced nothing."""
    failed = [one.finish_reason == "error" and not one.token_ids for one in output.outputs]
    return bool(failed) and all(failed)
