"""How much of a body is taken, how slowly, and how much of all bodies at once.

A body is read whole before the application sees it: all of vLLM's routes need it whole. Leaves out
what stands in it (``body``) and pictures that are fetched or decoded (``media``).
"""

import asyncio
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era_vllm_server.refusals import CLOSE, Header, Refusal

WINDOW_S: Final = 20.0
"""In each stretch so long, ``MIN_BYTES`` have to come, or the body's end."""
MIN_BYTES: Final = 20 * 1024
NO_BODY_BYTES: Final = 2**14
"""Of a request that has no use for a body: open paths and preflights ask for no key."""


class BodyLimits:
    """The layer: counts the bytes of every body that is being read or answered.

    Args:
        most_bytes: Of one body; more is a 413.
        most_in_all: Of all requests' that are under way; more is a 503.
        retry: Header that says when to come again.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, most_in_all: int, retry: Header) -> None:
        self.app = app
        self._most_bytes, self._most_in_all = most_bytes, most_in_all
        self._bytes = 0
        self._too_large = [_too_large(NO_BODY_BYTES), _too_large(most_bytes)]
        """Of a method without a body, and with one."""
        self._too_slow = Refusal(
            "body_rate",
            f"of the request's body less than {MIN_BYTES} bytes came in {WINDOW_S:g} s",
            HTTPStatus.REQUEST_TIMEOUT,
            (CLOSE,),
        )
        self._too_much = Refusal(
            "bodies",
            f"the bodies of the requests under way fill the {most_in_all} bytes that they may "
            "have; send the request again",
            HTTPStatus.SERVICE_UNAVAILABLE,
            (retry, CLOSE),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with_body = scope["method"] in ("POST", "PUT", "PATCH")
        most = self._most_bytes if with_body else NO_BODY_BYTES
        if _announced(scope) > most:
            await self._too_large[with_body].answer(scope, send)
            return
        taken = Taken()
        try:
            refusal = await self._read(taken, most, receive)
            if taken.size > most:
                refusal = self._too_large[with_body]
            if refusal is not None:
                await refusal.answer(scope, send)
            elif taken.whole:
                body = b"".join(taken.parts)
                taken.parts.clear()
                await self.app(scope, replay(body, receive), send)
        finally:
            self._bytes -= taken.size

    async def _read(self, taken: "Taken", most: int, receive: Receive) -> Refusal | None:
        """Take a body, for as long as it comes and may; not whole where the client has gone, or
        where it is longer than ``most``.

        Mutates: taken.
        """
        loop, counted = asyncio.get_running_loop(), 0
        try:
            async with asyncio.timeout(WINDOW_S) as patience:
                while not taken.whole:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    part: bytes = message.get("body", b"")
                    taken.parts.append(part)
                    taken.whole = not message.get("more_body", False)
                    taken.size += len(part)
                    self._bytes += len(part)
                    if taken.size - counted >= MIN_BYTES:
                        counted = taken.size
                        patience.reschedule(loop.time() + WINDOW_S)
                    if taken.size > most:
                        return None
                    if self._bytes > self._most_in_all:
                        return self._too_much
        except TimeoutError:
            return self._too_slow
        return None


def _too_large(most: int) -> Refusal:
    message = f"the request's body is longer than {most} bytes"
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    return Refusal("body_size", message, status, (CLOSE,))  # the rest of it is not read


@dataclass(slots=True)
class Taken:
    """What has come of a body."""

    parts: list[bytes] = field(default_factory=list)
    size: int = 0
    whole: bool = False


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives a body at once before what the server gives."""
    kept: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return kept.pop() if kept else await receive()

    return next_message


def _announced(scope: Scope) -> int:
    """Return the body's length by its header; 0 where that does not say, the body is counted."""
    values = [value for name, value in scope["headers"] if name == b"content-length"]
    return max([int(value[:20]) for value in values if value.isdigit()], default=0)
