"""Every answer on its way out: it names its request, and an error has the form of its API.

The name is the client's ``X-Request-Id`` or a new one; it is handed to vLLM, whose answer's own id
then holds it. An error is OpenAI's ``{"error": ...}``, on Anthropic's routes theirs, and has 16 KB
at most: what has that form and length passes byte for byte, and so does what is no error; others
(FastAPI's ``{"detail": ...}``, plain texts, what repeats a megabyte of its request) are written
anew. Leaves out what uvicorn says itself, of what is no HTTP (``wire``).
"""

import json
import re
import uuid
from http import HTTPStatus
from typing import Any, Final

from starlette._utils import get_route_path
from starlette.types import Message, Scope, Send

_HEADER: Final = b"x-request-id"
_NAME: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
MAX_BYTES: Final = 2**14
"""Of an error's body."""
_MOST: Final = {"message": 2000, "type": 100, "param": 100}
"""Characters of an error that is too long; JSON spells one with six bytes at most."""
_CUT: Final = "... (cut)"
_ANTHROPIC: Final = "/v1/messages"


def named(scope: Scope) -> tuple[bytes, Scope]:
    """Return a request's name, and its scope with that name alone as ``X-Request-Id``."""
    given = next((value for name, value in scope["headers"] if name == _HEADER), b"")
    name = given if _NAME.fullmatch(given) else uuid.uuid4().hex.encode()
    others = [pair for pair in scope["headers"] if pair[0] != _HEADER]
    return name, {**scope, "headers": [*others, (_HEADER, name)]}


class Reply:
    """What ``send`` is for one request."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._name, self.scope = named(scope)
        self._anthropic = f"{get_route_path(scope)}/".startswith(f"{_ANTHROPIC}/")
        self._send = send
        self.started = False
        self._error: Message | None = None
        """The start of an error, which waits for the end of its body."""
        self._body = b""

    async def __call__(self, message: Message) -> None:
        """Send the next message, or keep it until an error is whole."""
        if message["type"] == "http.response.start":
            others = [pair for pair in message.get("headers", ()) if pair[0].lower() != _HEADER]
            message = {**message, "headers": [*others, (_HEADER, self._name)]}
            if message["status"] >= HTTPStatus.BAD_REQUEST:
                self._error, self._body = message, b""
                return
        elif self._error is not None:
            self._body += message.get("body", b"")
            if message.get("more_body", False):
                return
            start, self._error = self._error, None
            body = error_body(self._body, start["status"], anthropic=self._anthropic)
            if body != self._body:
                kinds = (b"content-type", b"content-length")
                others = [pair for pair in start["headers"] if pair[0].lower() not in kinds]
                length = str(len(body)).encode()
                own = [(b"content-type", b"application/json"), (b"content-length", length)]
                start = {**start, "headers": [*others, *own]}
            await self._send(start)
            message = {**message, "body": body}
        self.started = True
        await self._send(message)


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
