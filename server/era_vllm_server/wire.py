"""What uvicorn reads from a connection before any application is asked: bounded in bytes and time.

uvicorn's default protocol (httptools) takes heads of any length for as long as it takes; vLLM's
``--h11-max-*`` bound the other one only. Leaves out bodies: ``exchange`` bounds those.

Upstream: uvicorn/protocols/http/httptools_impl.py ``HttpToolsProtocol`` (0.54.0). Remove when it
has limits of its own.
"""

import asyncio
from http import HTTPStatus
from typing import Any, Final

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from era_vllm_server.metrics import REJECTED

MAX_HEAD_BYTES: Final = 2**18
"""A read is as long at most, so that one read never is too much."""
HEAD_TIMEOUT_S: Final = 60.0
"""From the connection, or from a further request's first byte, to the end of its head."""
_FRAMING: Final = 8
"""Bytes that a chunk's frame may take for each byte of the body, at one byte a chunk."""


def bound(config: Config) -> None:
    """Have a server use the bounded protocol where it would use httptools'.

    Mutates: config.
    """
    if config.http_protocol_class is HttpToolsProtocol:
        config.http_protocol_class = BoundedProtocol


class BoundedProtocol(HttpToolsProtocol):
    """Ends a connection whose head, trailers or framing do not end."""

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401  # uvicorn's
        super().__init__(*args, **options)
        self._received = self._body = 0
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._received += len(data)
        if self._received - _FRAMING * self._body > 2 * MAX_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head_size")

    def on_message_begin(self) -> None:
        self._received = self._body = 0
        if self._late is None:
            self._wait_for_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_is_here()
        super().on_headers_complete()
        websocket = self.parser.should_upgrade() and self._should_upgrade()
        if websocket and self.scope["method"] != "GET":  # which nobody would answer
            self._refuse(HTTPStatus.BAD_REQUEST, "upgrade")

    def handle_websocket_upgrade(self) -> None:
        if not self.transport.is_closing():
            super().handle_websocket_upgrade()

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def _wait_for_head(self) -> None:
        why = HTTPStatus.REQUEST_TIMEOUT, "head_timeout"
        self._late = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, *why)

    def _head_is_here(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        """Say why, unless an answer is on its way, and close."""
        if self.transport.is_closing():
            return
        REJECTED.labels(reason).inc()
        if self.cycle is None or self.cycle.response_complete:
            head = STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(head)
        self.transport.close()
