"""One request on its way through the guard: its body is counted, and it can be stopped.

Stopping never cancels the application: vLLM would let the engine go on. The application is told
that its client has gone (``http.disconnect``), on which vLLM aborts the engine's request itself,
and what it still says is replaced by our answer. One that does not listen goes on behind it.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era_vllm_server.logs import CLIENT_GONE
from era_vllm_server.metrics import REJECTED

Header = tuple[bytes, bytes]
_log = logging.getLogger(__name__)
_ANSWER_LIMIT_S: Final = 5.0
"""For our last word to a client that does not read."""
PATIENCE_S: Final = 1.0
"""How long an application that was stopped may take to end before we answer all the same."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served."""

    status: HTTPStatus
    reason: str
    """Label of the metric."""
    message: str
    headers: tuple[Header, ...] = ()

    def body(self) -> bytes:
        """Return OpenAI's form of an error."""
        error = {
            "message": self.message,
            "type": self.status.phrase,
            "param": None,
            "code": self.status.value,
        }
        return json.dumps({"error": error}).encode()

    async def answer(self, send: Send) -> None:
        """Send it as the whole response, and count it."""
        REJECTED.labels(self.reason).inc()
        body = self.body()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *self.headers,
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def end_stream(self, send: Send) -> None:
        """Send it as the last events of a stream that has begun, and count it."""
        REJECTED.labels(self.reason).inc()
        await send({"type": "http.response.body", "body": last_events(self.body())})


def last_events(error: bytes) -> bytes:
    """Return what ends a stream with an error's body.

    The event is named for clients of /v1/messages and /v1/responses; those of chat read the
    ``error`` in its data.
    """
    return b"event: error\ndata: " + error + b"\n\ndata: [DONE]\n\n"


class Exchange:
    """A request and its response."""

    def __init__(
        self,
        receive: Receive,
        send: Send,
        send_own: Send,
        max_body: tuple[int, Refusal],
        headers: Callable[[int], list[Header]],
    ) -> None:
        """Watch one.

        Args:
            receive: The server's.
            send: The server's, for the application's answer.
            send_own: The same for a refusal of ours.
            max_body: Bytes that the body may have, and the answer to more.
            headers: What to add to a response of a status.
        """
        self._from_client, self._to_client, self._send_own = receive, send, send_own
        self._max_body, self._headers = max_body, headers
        self._body_bytes = 0
        self._status: int = HTTPStatus.INTERNAL_SERVER_ERROR  # uvicorn's, where nothing is said
        self._started = self._stream = self._complete = self._left = False
        self._stopped: Refusal | None = None
        self._waiting = set[asyncio.Timeout]()
        self._patience_ends: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, app: ASGIApp, scope: Scope, background: set[asyncio.Task[None]]) -> int:
        """Let an application answer it, unless it is stopped.

        Args:
            app: The application.
            scope: The request's.
            background: Keeps applications that go on after we have answered for them.

        Returns:
            The status that the client was told last: a refusal's also in a stream that had begun
            with 200; ``CLIENT_GONE`` where it left.
        """
        work = asyncio.create_task(
            cast("Coroutine[Any, Any, None]", app(scope, self._receive, self._send))
        )
        try:
            await asyncio.wait({work, self._patience_ends}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # by the server, at its own end
            work.cancel()
            raise
        background.add(work)
        work.add_done_callback(background.discard)
        if self._stopped is None:
            await work
        else:
            work.add_done_callback(_ended)
            if not self._complete:
                tell = self._stopped.end_stream if self._started else self._stopped.answer
                with suppress(TimeoutError):  # it does not read
                    async with asyncio.timeout(_ANSWER_LIMIT_S):
                        await tell(self._send_own)
                return self._stopped.status
        return CLIENT_GONE if self._left else self._status

    def stop(self, refusal: Refusal) -> None:
        """End it with a refusal; a JSON response that is under way is left to finish."""
        if self._stopped is None and (self._stream or not self._started):
            self._stopped = refusal
            loop = asyncio.get_running_loop()
            for waiting in self._waiting:
                waiting.reschedule(loop.time())
            loop.call_later(PATIENCE_S, self._patience_ends.set_result, None)

    async def _receive(self) -> Message:
        message: Message = {"type": "http.disconnect"}
        if self._stopped is None:
            try:
                async with asyncio.timeout(None) as waiting:
                    self._waiting.add(waiting)
                    message = await self._from_client()
                self._left |= message["type"] == "http.disconnect" and not self._complete
            except TimeoutError:  # stopped
                pass
            finally:
                self._waiting.discard(waiting)
        self._body_bytes += len(message.get("body", b""))
        limit, refusal = self._max_body
        if self._body_bytes > limit:
            self.stop(refusal)
        return message if self._stopped is None else {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._stopped is not None:
            raise OSError("the request was stopped")  # what ASGI says of a client that has gone
        if message["type"] == "http.response.start":
            headers, status = list(message.get("headers", [])), message["status"]
            kinds = [value for name, value in headers if name == b"content-type"]
            names = {name for name, _ in headers}
            added = [header for header in self._headers(status) if header[0] not in names]
            await self._to_client({**message, "headers": [*headers, *added]})
            # not before: until a client reads that did not so far, another answer can be given
            self._started, self._status = True, status
            self._stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
            return
        elif message["type"] == "http.response.body":
            self._complete = not message.get("more_body", False)
        await self._to_client(message)


def _ended(work: asyncio.Task[None]) -> None:
    """Take note of how an application ended that was stopped: layers make of the OSError, which
    ``_send`` gave them, whatever they like."""
    error = None if work.cancelled() else work.exception()
    if error is not None:
        _log.debug("a stopped request ended by %s", type(error).__name__)
