"""uvicorn's h11 protocol, with what no flag of it bounds: waiting, deafness and crumbs.

h11 itself bounds a request's head, its trailers and a chunk's frame (vLLM's
``--h11-max-incomplete-event-size``), takes one request at a time, and reads the body of a request
that asks for another protocol (``Upgrade: h2c``, which every JDK HttpClient sends) as RFC 9110 7.8
has it: httptools, uvicorn's first choice, leaves such a body out and has no bounds at all.

Upstream: uvicorn/protocols/http/h11_impl.py ``H11Protocol`` (0.54). Remove when uvicorn has a
timeout for heads and for clients that do not read.
"""

import asyncio
import json
import sys
import uuid
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

TIMEOUT_S: Final = 60.0
"""From the connection, or from a further request's first byte, to the end of its head; and for a
client that has stopped to read."""
_SLICE: Final = 2**14
_FEW: Final = 2**10
"""Bytes in one read that are taken whatever they are: a chunk is 10 microseconds of all others'."""


def use_bounded_h11(
    config: Config, count: Callable[[int, str], None], *, websockets: bool = False
) -> None:
    """Have a server speak HTTP/1.1 by the bounded protocol.

    Args:
        config: Of a server that has not begun to listen.
        count: Called with status and reason of what is refused before any application.
        websockets: Whether the application has any; uvicorn's wait for a bad handshake for ever.

    Mutates: config.
    """
    if not websockets:
        config.ws_protocol_class = None
    config.http_protocol_class = partial(BoundedH11, count)  # type: ignore[assignment]


class BoundedH11(H11Protocol):
    """Ends a connection that gives or takes nothing, or its body in crumbs."""

    def __init__(self, count: Callable[[int, str], None], *args: Any, **options: Any) -> None:  # noqa: ANN401  # uvicorn's
        super().__init__(*args, **options)
        self._count = count
        self._silent = True
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._head_timer, self._write_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._silent = False
        for at in range(0, len(data), _SLICE):
            part = data[at : at + _SLICE]
            if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
                part = part.lstrip(b"\r\n")  # empty lines before a request, RFC 9112 2.2
            in_body = self.conn.their_state is h11.SEND_BODY
            had = len(self.cycle.body) if in_body else 0
            if part:
                super().data_received(part)
            if self.transport.get_protocol() is not self:  # a websocket's by now
                _cancel(self._head_timer)
                return
            self._check_chunks(len(part) if in_body else 0, had)
            if self.transport.is_closing():
                return
        if self.conn.their_state is not h11.IDLE:
            _cancel(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None:
            self._time_head()

    def _check_chunks(self, received: int, had: int) -> None:
        """End a body that is mostly frames: a chunk costs time in which all others wait."""
        if self.cycle is None or not self.headers:
            return
        names = {name for name, _ in self.headers}
        if b"transfer-encoding" not in names:
            return
        if b"content-length" in names:  # RFC 9112 6.1
            self.cycle.keep_alive = False
        taken = len(self.cycle.body) - had
        if self.conn.their_state is h11.SEND_BODY and received > _FEW and 3 * taken < received:
            self._refuse(HTTPStatus.BAD_REQUEST, "chunk_size")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_write()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._time_write()  # anew, for what is left

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._time_write()  # what is not read yet keeps it open

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._time_write()

    def _time_write(self, left: int | None = None) -> None:
        """Leave a client that reads nothing of what is written from one look to the next."""
        _cancel(self._write_timer)
        size = self.transport.get_write_buffer_size()
        if size and size == left:
            self.transport.abort()
        elif size:
            self._write_timer = self.loop.call_later(TIMEOUT_S, self._time_write, size)

    def send_400_response(self, msg: str) -> None:
        """Say which bound it was, by h11's own status."""
        status = HTTPStatus(getattr(sys.exc_info()[1], "error_status_hint", 400))
        too_large = status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        self._refuse(status, "head_size" if too_large else "malformed")

    def _should_upgrade(self) -> bool:
        """Ignore every other upgrade than a websocket's, without a line in the log for each."""
        websocket = self._get_upgrade() == b"websocket" and self.scope["method"] == "GET"
        return websocket and self.ws_protocol_class is not None and super()._should_upgrade()

    def _time_head(self) -> None:
        why = HTTPStatus.REQUEST_TIMEOUT, "head_timeout"
        self._head_timer = self.loop.call_later(TIMEOUT_S, self._refuse, *why)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        """Say why, unless nothing was asked or an answer is on its way, and close."""
        if self.transport.is_closing():
            return
        if not self._silent:
            begun = self.cycle and self.cycle.response_started and not self.cycle.response_complete
            self._count(0 if begun else status, reason)
            if not begun:
                self.transport.write(_response(status, reason))
        self.transport.close()
        self._time_write()


def _response(status: HTTPStatus, reason: str) -> bytes:
    message = f"the request cannot be read ({reason}): {status.description or status.phrase}"
    error = {"message": message, "type": status.phrase, "param": None, "code": status.value}
    body = json.dumps({"error": error}).encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nx-request-id: {uuid.uuid4().hex}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body


def _cancel(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()
