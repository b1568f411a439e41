"""What a request is told that is not served, in OpenAI's form of an error; and that it is counted.

Leaves out when: the layers in ``middleware`` decide.
"""

import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from starlette.types import Scope, Send

from era_vllm.compat.starlette_path import get_route_path
from era_vllm_server.metrics import REJECTED

Header = tuple[bytes, bytes]
CLOSE: Final[Header] = (b"connection", b"close")
STATUS: Final = "era_status"
"""Key of ``request.state``: what the client was told last, where that is not the response's own."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served."""

    reason: str
    """Label of the metric."""
    message: str
    status: HTTPStatus = HTTPStatus.BAD_REQUEST
    headers: tuple[Header, ...] = ()
    close_code: int = 1008
    """Of a websocket."""

    def body(self) -> bytes:
        """Return OpenAI's form of an error."""
        error = {
            "message": self.message,
            "type": self.status.phrase,
            "param": None,
            "code": self.status.value,
        }
        return json.dumps({"error": error}).encode()

    async def answer(self, scope: Scope, send: Send) -> None:
        """Send it as the whole response, and count it."""
        REJECTED.labels(self.reason).inc()
        if scope["type"] == "websocket":  # closed before it is accepted it is a 403
            close = {"type": "websocket.close", "code": self.close_code, "reason": self.reason}
            await send(close)
            return
        body = self.body()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *self.headers,
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def end_stream(self, scope: Scope, send: Send) -> None:
        """Send it as the last events of a stream that has begun, and count it."""
        REJECTED.labels(self.reason).inc()
        scope.setdefault("state", {})[STATUS] = self.status
        body = last_events(self.body())
        if get_route_path(scope).startswith("/v1/messages"):  # Anthropic's form, and no [DONE]
            error = {"type": self.status.phrase, "message": self.message}
            data = json.dumps({"type": "error", "error": error}).encode()
            body = b"event: error\ndata: " + data + b"\n\n"
        await send({"type": "http.response.body", "body": body})


def last_events(error: bytes) -> bytes:
    """Return what ends a stream with an error's body.

    The event is named for clients of /v1/messages and /v1/responses; those of chat read the
    ``error`` in its data.
    """
    return b"event: error\ndata: " + error + b"\n\ndata: [DONE]\n\n"
