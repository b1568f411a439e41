"""A request's work ends at its deadline, or when something else stops it, as a drain does.

Stopping never cancels the application: vLLM would let the engine go on. The application is told
that its client has gone (``http.disconnect``), on which vLLM aborts the engine's request itself,
and what it still says is replaced by our answer. One that does not listen goes on behind it.
"""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era_vllm_server.refusals import CLOSE, Refusal

_log = logging.getLogger(__name__)
_ANSWER_LIMIT_S: Final = 5.0
"""For our last word to a client that does not read."""
PATIENCE_S: Final = 1.0
"""How long an application that was stopped may take to end before we answer all the same."""


class Deadline:
    """The layer: knows which requests are under way; a limit of 0 = without a deadline."""

    def __init__(self, app: ASGIApp, limit_s: float) -> None:
        self.app = app
        self.limit_s = limit_s
        self.in_flight = set[Exchange]()
        self._background = set[asyncio.Task[None]]()
        self._too_late = Refusal(
            "deadline",
            f"the request took longer than {limit_s:g} s and was ended",
            HTTPStatus.GATEWAY_TIMEOUT,
            (CLOSE,),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send)
        timer = None
        if self.limit_s:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self.limit_s, exchange.stop, self._too_late)
        self.in_flight.add(exchange)
        try:
            await exchange.run(self.app, self._background)
        finally:
            self.in_flight.discard(exchange)
            if timer is not None:
                timer.cancel()


class Exchange:
    """A request and its response, which can be stopped."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._from_client, self._to_client = scope, receive, send
        self._started = self._stream = self._complete = False
        self._refusal: Refusal | None = None
        self._waiting = set[asyncio.Timeout]()
        self._patience_ends: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, app: ASGIApp, background: set[asyncio.Task[None]]) -> None:
        """Let an application answer it, unless it is stopped.

        ``background`` keeps those that go on behind the answer from the garbage collector.
        """
        coroutine = app(self._scope, self._receive, self._send)
        work = asyncio.create_task(cast("Coroutine[Any, Any, None]", coroutine))
        try:
            await asyncio.wait({work, self._patience_ends}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # by the server, at its own end
            work.cancel()
            raise
        background.add(work)
        work.add_done_callback(background.discard)
        if self._refusal is None:
            await work
            return
        work.add_done_callback(_log_end)
        if not self._complete:
            answer = self._refusal.end_stream if self._started else self._refusal.answer
            with suppress(TimeoutError):  # it does not read
                async with asyncio.timeout(_ANSWER_LIMIT_S):
                    await answer(self._scope, self._to_client)

    def stop(self, refusal: Refusal) -> None:
        """End it with a refusal; a JSON response that is under way is left to finish."""
        if self._refusal is None and (self._stream or not self._started):
            self._refusal = refusal
            loop = asyncio.get_running_loop()
            for waiting in self._waiting:
                waiting.reschedule(loop.time())
            loop.call_later(PATIENCE_S, self._patience_ends.set_result, None)

    async def _receive(self) -> Message:
        message: Message = {"type": "http.disconnect"}
        if self._refusal is None:
            try:
                async with asyncio.timeout(None) as waiting:
                    self._waiting.add(waiting)
                    message = await self._from_client()
            except TimeoutError:  # stopped
                pass
            finally:
                self._waiting.discard(waiting)
        return message if self._refusal is None else {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._refusal is not None:
            raise OSError("the request was stopped")  # what ASGI says of a client that has gone
        if message["type"] == "http.response.body":
            self._complete = not message.get("more_body", False)
        await self._to_client(message)
        if message["type"] == "http.response.start":
            # not before: until a client reads that did not so far, another answer can be given
            self._started = True
            headers = message.get("headers", ())
            kinds = [value for name, value in headers if name == b"content-type"]
            self._stream = any(kind.startswith(b"text/event-stream") for kind in kinds)


def _log_end(work: asyncio.Task[None]) -> None:
    """Take note of how an application ended that was stopped: layers make of the OSError, which
    ``_send`` gave them, whatever they like."""
    error = None if work.cancelled() else work.exception()
    if error is not None:
        _log.debug("a stopped request ended by %s", type(error).__name__)
