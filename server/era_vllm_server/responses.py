"""Puts the ``era`` object into what vLLM answers, and changes no other byte of it.

The object is inserted before a closing brace of vLLM's own text, which is never parsed and written
again: how it spells a number or a letter stays as it was.
"""

import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Final

from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from era_vllm.compat.vllm_entrypoints import create_error_response
from era_vllm_server.refusals import last_events

logger = logging.getLogger(__name__)

Place = Callable[[str, bool], int | None]
"""(an event of a stream, whether an earlier one holds the object) -> index of the brace before
which it goes; None = not into this one."""


_WHOLE: Final = (
    "response.created",
    "response.completed",
    "response.incomplete",
    "response.failed",
)
"""Events that hold a response as it stands."""


def with_era(response: Response, era: Mapping[str, object], place: Place) -> Response:
    """Return a response that holds the object; refusals are returned as they are.

    Mutates: response, where it is JSON.
    """
    if response.status_code != HTTPStatus.OK:
        return response
    member = '"era":' + json.dumps(era, separators=(",", ":"))
    if isinstance(response, StreamingResponse):
        events = _events(response.body_iterator, member, place)
        closing = _Closing(events, response.status_code, background=response.background)
        closing.raw_headers = response.raw_headers
        return closing
    else:
        body = bytes(response.body)
        if not body:  # vLLM 0.33's answer to a client that has gone
            return response
        at = body.rindex(b"}")
        response.body = b"".join((body[:at], b",", member.encode(), body[at:]))
        response.headers["content-length"] = str(len(response.body))
    return response


class _Closing(StreamingResponse):
    """A stream whose events end with it.

    Starlette leaves them to the garbage collector where it is stopped while it sends, and so long
    the engine goes on.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


def in_chat(event: str, placed: bool) -> int | None:
    """Place it in the first chunk, and in the usage chunk, which has no choices."""
    if '"choices":' in event and (not placed or '"choices":[]' in event):
        return event.rindex("}")
    return None


def in_responses(event: str, placed: bool) -> int | None:
    """Place it in the response that is created, and in the one that has ended."""
    kind = event.partition("\n")[0].removeprefix("event: ")
    if kind in _WHOLE:
        return _end(event, "response")
    return None


def in_messages(event: str, placed: bool) -> int | None:
    """Place it in the message that starts, as which clients keep it."""
    return _end(event, "message") if event.startswith("event: message_start\n") else None


def _end(event: str, name: str) -> int:
    """Return the index of the brace that closes a member of an event's object."""
    start = event.index(f'"{name}":{{') + len(name) + 3
    return json.JSONDecoder().raw_decode(event, start)[1] - 1


async def _events(
    events: AsyncGenerator[str, None], member: str, place: Place
) -> AsyncGenerator[str, None]:
    """Yield the events with the object in them; what vLLM raises becomes the last one.

    Upstream: vllm/entrypoints/openai/responses/serving.py lets errors of the engine pass, and the
    connection is cut (0.32.0); its chat route sends them as an event.
    """
    placed = False
    try:
        async with aclosing(events):
            async for event in events:
                at = place(event, placed)
                if at is None:
                    yield event
                else:
                    placed = True
                    yield f"{event[:at]},{member}{event[at:]}"
    except Exception as error:  # whatever vLLM makes of a request that it has begun to answer
        logger.warning("a stream ended by %s", type(error).__name__)
        said = create_error_response(error).model_dump_json()
        yield last_events(said.encode()).decode()
