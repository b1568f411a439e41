"""Asks vLLM again where a request failed through no fault of its own, unseen by its client.

vLLM keeps pictures twice: the API server remembers what it has sent, the engine what it has got. A
request that is shed or given up after its pictures were processed leaves the first ahead of the
second; the next request with such a picture, somebody else's perhaps, then fails with an internal
error, upon which vLLM forgets the picture and counts on the client to ask again. We do.

Upstream: vllm/v1/engine/core.py:2001 ``_handle_mm_cache_miss`` (0.32.0), which calls it retryable;
its chat routes answer 500. Remove when they retry, or say 503.
"""

import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Final

from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GenerationError, VLLMError

from era_vllm_server.exchange import last_events

Ask = Callable[[], Awaitable[Response | None]]
"""Runs the request from its start."""
_MORE: Final = 2
"""A request with several pictures may miss them one after another."""
_FAILED: Final = re.compile(r'"message": ?"Internal server error"')
"""In the event that vLLM makes of a ``GenerationError``; other errors have other texts."""
_OPENING: Final = ("event: response.created\n", "event: response.in_progress\n", "event: ping\n")
"""Events beside a stream's first that come before the engine has done anything."""


async def answered(ask: Ask, more: int = _MORE) -> Response | None:
    """Return vLLM's response; a request that fails at its start is asked again.

    Args:
        ask: Runs the request.
        more: How often again.

    Raises:
        GenerationError: it fails every time.
    """
    try:
        response = await ask()
    except GenerationError:
        if more == 0:
            raise
        return await answered(ask, more - 1)
    if isinstance(response, StreamingResponse):
        closing = _Closing(
            _stream(response.body_iterator, ask, more),
            response.status_code,
            background=response.background,
        )
        closing.raw_headers = response.raw_headers
        return closing
    return response


class _Closing(StreamingResponse):
    """A stream whose events end with it.

    Starlette leaves them to the garbage collector where it is stopped while it sends, and so long
    the engine goes on.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


async def _stream(
    events: AsyncGenerator[str, None], ask: Ask, more: int
) -> AsyncGenerator[str, None]:
    """Hold a stream's opening back until something else comes; if that is the failure, ask."""
    held = list[str]()
    async with aclosing(events):
        async for event in events:
            held.append(event)
            if more and _FAILED.search(event):
                break
            if len(held) > 1 and not event.startswith(_OPENING):
                for one in held:
                    yield one
                async for rest in events:
                    yield rest
                return
        else:
            for one in held:
                yield one
            return
        rest_of_failed = [event async for event in events]
    try:
        second = await answered(ask, more - 1)
    except GenerationError:
        second = None
    except VLLMError as error:  # the queue is full by now, as a rule
        body = create_error_response(error).model_dump_json()
        yield last_events(body.encode()).decode()
        return
    if not isinstance(second, StreamingResponse):
        for one in [*held, *rest_of_failed]:
            yield one
        return
    async with aclosing(second.body_iterator) as events:
        async for event in events:
            yield event
    if second.background is not None:
        await second.background()
