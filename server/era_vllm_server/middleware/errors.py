"""Every error on its way out has the form of its API, and 16 KB at most.

OpenAI's is ``{"error": ...}``, on Anthropic's routes it is theirs. What has that form and length
passes byte for byte, and so does what is no error; others (FastAPI's ``{"detail": ...}``, plain
texts, what repeats a megabyte of its request) are written anew. Leaves out what is refused before
any layer is asked (``compat/uvicorn_h11``).
"""

import json
from dataclasses import KW_ONLY, dataclass
from http import HTTPStatus
from typing import Any, Final

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era_vllm.compat.starlette_path import get_route_path
from era_vllm.compat.vllm_entrypoints import create_error_response

MAX_BYTES: Final = 2**14
"""Of an error's body."""
_MOST: Final = {"message": 2000, "type": 100, "param": 100}
"""Characters of an error that is too long; JSON spells one with six bytes at most."""
_CUT: Final = "... (cut)"
_ANTHROPIC: Final = "/v1/messages"


@dataclass(frozen=True, slots=True)
class ErrorForm:
    """The layer; what an application raises it answers too, and raises it on."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        anthropic = f"{get_route_path(scope)}/".startswith(f"{_ANTHROPIC}/")
        reply = Reply(send, anthropic=anthropic)
        try:
            await self.app(scope, receive, reply)
        except Exception as error:  # starlette's own answer to it would pass beside this layer
            if not reply.started:
                body = create_error_response(error).model_dump()
                await JSONResponse(body, HTTPStatus.INTERNAL_SERVER_ERROR)(scope, receive, reply)
            raise


@dataclass(slots=True)
class Reply:
    """What ``send`` is for one request: an error's messages are kept until it is whole."""

    send: Send
    _: KW_ONLY
    anthropic: bool
    started: bool = False
    _error: Message | None = None
    """The start of an error, which waits for the end of its body."""
    _body: bytes = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
            self._error, self._body = message, b""
            return
        if self._error is not None:
            self._body += message.get("body", b"")
            if message.get("more_body", False):
                return
            start, self._error = self._error, None
            body = error_body(self._body, start["status"], anthropic=self.anthropic)
            if body != self._body:
                kinds = (b"content-type", b"content-length")
                others = [pair for pair in start["headers"] if pair[0].lower() not in kinds]
                length = str(len(body)).encode()
                own = [(b"content-type", b"application/json"), (b"content-length", length)]
                start = {**start, "headers": [*others, *own]}
            await self.send(start)
            message = {**message, "body": body}
        self.started = True
        await self.send(message)


def error_body(body: bytes, status: int, *, anthropic: bool) -> bytes:
    """Return an error in the form of its API; one in it, and of no API (``/ready``), as it is."""
    try:
        said = json.loads(body)
    except ValueError:
        said = {"error": body.decode(errors="replace")}
    whole: dict[str, Any] = said if isinstance(said, dict) else {"error": said}
    error = whole.get("error", whole.get("detail"))
    formed = isinstance(error, dict) and isinstance(error.get("message"), str)
    right = (formed and (whole.get("type") == "error") == anthropic) or error is None
    if right and len(body) <= MAX_BYTES:
        return body
    error = error if isinstance(error, dict) else {"message": error}
    phrase = HTTPStatus(status).phrase
    error = {"message": phrase, "type": phrase} | {name: at for name, at in error.items() if at}
    message, kind, param = (_cut(error.get(name), most) for name, most in _MOST.items())
    inner = {"message": message, "type": kind}
    if anthropic:
        return json.dumps({"type": "error", "error": inner}).encode()
    return json.dumps({"error": {**inner, "param": param, "code": status}}).encode()


def _cut(said: object, most: int) -> str | None:
    """Return a text, without its end where it is too long."""
    text = said if said is None or isinstance(said, str) else json.dumps(said)
    return text if text is None or len(text) <= most else text[:most] + _CUT
