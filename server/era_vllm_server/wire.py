"""What uvicorn does with a connection before any application is asked: bounded in bytes and time.

uvicorn's default protocol (httptools) takes heads of any length for as long as it takes, any number
of requests before the first is answered, and keeps a client that does not read; vLLM's
``--h11-max-*`` bound the other protocol only. Leaves out bodies: ``exchange`` bounds those.

Upstream: uvicorn/protocols/http/httptools_impl.py ``HttpToolsProtocol`` (0.54.0). Remove when it
has limits of its own.
"""

import asyncio
from http import HTTPStatus
from typing import Any, Final

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from era_vllm_server.metrics import REJECTED, RESPONSES

MAX_HEAD_BYTES: Final = 2**18
"""A read is as long at most, so that one read never is too much."""
TIMEOUT_S: Final = 60.0
"""From the connection, or from a further request's first byte, to the end of its head; and for a
client that has stopped to read."""
_FRAMING: Final = 8
"""Bytes that a chunk's frame may take for each byte of the body, at one byte a chunk."""


def bound(config: Config) -> None:
    """Have a server use the bounded protocol where it would use httptools'.

    Mutates: config.
    """
    if config.http_protocol_class is HttpToolsProtocol:
        config.http_protocol_class = BoundedProtocol


class BoundedProtocol(HttpToolsProtocol):
    """Ends a connection that gives or takes nothing, or more than one request at a time."""

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401  # uvicorn's
        super().__init__(*args, **options)
        self._received = self._body = 0
        self._silent, self._upgraded = True, False
        self._late: asyncio.TimerHandle | None = None
        self._deaf: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        self._hears()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._silent = False
        super().data_received(data)
        if self._upgraded or self.transport.is_closing():
            return
        self._received += len(data)
        if self._received - _FRAMING * self._body > 2 * MAX_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head_size")
        elif self._late is None and self.timeout_keep_alive_task is None and not self._answering():
            self._wait_for_head()  # these bytes began nothing, and ended uvicorn's own wait

    def pause_writing(self) -> None:
        super().pause_writing()
        self._deaf = self.loop.call_later(TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._hears()
        super().resume_writing()

    def on_message_begin(self) -> None:
        self._received = self._body = 0
        if self._late is None:
            self._wait_for_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_is_here()
        if self.pipeline or (self._answering() and not self._written()):
            raise ValueError("a request before the last one was answered")  # a 400 of uvicorn's
        super().on_headers_complete()
        websocket = self.parser.should_upgrade() and self._should_upgrade()
        if websocket and self.scope["method"] != "GET":  # which nobody would answer
            self._refuse(HTTPStatus.BAD_REQUEST, "upgrade")

    def handle_websocket_upgrade(self) -> None:
        if not self.transport.is_closing():
            self._upgraded = True
            super().handle_websocket_upgrade()

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        if self._answering():
            self.cycle.keep_alive = False  # its answer is the last
            return
        RESPONSES.labels("400").inc()
        super().send_400_response(msg)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _written(self) -> bool:
        """Tell whether all that was announced is out, upon which a client may rightly go on."""
        cycle = self.cycle
        whole = cycle.chunked_encoding is False and cycle.expected_content_length == 0
        return cycle.response_started and whole

    def _wait_for_head(self) -> None:
        why = HTTPStatus.REQUEST_TIMEOUT, "head_timeout"
        self._late = self.loop.call_later(TIMEOUT_S, self._refuse, *why)

    def _head_is_here(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _hears(self) -> None:
        if self._deaf is not None:
            self._deaf.cancel()
            self._deaf = None

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        """Say why, unless nothing was asked or an answer is on its way, and close."""
        if self.transport.is_closing():
            return
        if not self._silent:
            REJECTED.labels(reason).inc()
            if not self._answering():
                RESPONSES.labels(str(status.value)).inc()
                head = STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n"
                self.transport.write(head)
        self.transport.close()
