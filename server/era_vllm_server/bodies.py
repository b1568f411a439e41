"""The layer that sees each request's body once, before its route: it opens the request's scope.

It refuses bodies that would hold up the server, and what ``fields`` says of the others; most hold
none of its words and are not parsed here. It also counts the pictures of what is answered.
"""

import json
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

from starlette._utils import get_route_path  # what the router strips, by the router's rule
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era_vllm.vllm_plugin.requests import ImageReport, scope
from era_vllm_server.exchange import Refusal
from era_vllm_server.fields import BATCH, WORDS, check, owner, refused
from era_vllm_server.logs import IMAGES as LOGGED
from era_vllm_server.metrics import CLAMPED, IMAGES, TOKENS_AFTER, TOKENS_BEFORE

_RAW_HALF: Final = re.compile(rb"\xed[\xa0-\xbf]")


class Bodies:
    """An ASGI layer inside of vLLM's authentication."""

    def __init__(
        self, app: ASGIApp, take_era: frozenset[str], policy: str, allow_image_uuid: bool
    ) -> None:
        """Put it around an application.

        Args:
            app: vLLM's.
            take_era: Paths whose bodies may have the field ``era``.
            policy: Label of what is counted.
            allow_image_uuid: Put a client's names apart by its key, instead of refusing them.
        """
        self._app = app
        self._take_era = take_era
        self._policy = policy
        self._allow_image_uuid = allow_image_uuid

    async def __call__(self, asgi: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if asgi["type"] != "http":
            await self._app(asgi, receive, send)
            return
        if asgi["method"] in ("POST", "PUT", "PATCH"):
            body, again = await _read(receive)
            refusal, changed = self._check(_path(asgi), asgi, body or b"")
            if refusal is not None:
                await refusal.answer(send)
                return
            if changed is not None:
                asgi, again = _with_body(asgi, changed, receive)
            receive = again
        with scope() as request:

            async def counting(message: Message) -> None:
                if message.get("status") == HTTPStatus.OK:  # of a stream before its first event
                    self._count(asgi, request.all_images)
                await send(message)

            await self._app(asgi, receive, counting)

    def _check(self, path: str, asgi: Scope, body: bytes) -> tuple[Refusal | None, bytes | None]:
        """Return why a body is refused, or how it is to be read instead."""
        if body[:9].lstrip().startswith(b"--"):  # a form's, which no route reads as JSON
            return None, None
        containers = body.count(b"[") + body.count(b"{")
        if containers > _MOST_CONTAINERS or body.count(b",") > _MOST_VALUES:
            return refused("body_shape", _SHAPE), None
        escaped = b"\\" in body
        hidden = b"\x00" in body or (escaped and b"\\u00" in body)  # UTF-16; spelled by escapes
        halves = hidden or (escaped and (b"\\ud" in body or b"\\uD" in body)) or _raw_half(body)
        plain = not (hidden or halves or containers > _SHALLOW or path == BATCH)
        if plain and not WORDS.search(body):
            return None, None
        try:
            fields = json.loads(body)
            if halves:
                json.dumps(fields, ensure_ascii=False).encode()
        except RecursionError:  # which not every route takes for a client's error
            return refused("body_shape", _SHAPE), None
        except UnicodeEncodeError:
            return refused("body_shape", _HALF), None
        except ValueError:  # the route's to refuse
            return None, None
        if not isinstance(fields, dict):
            return None, None
        names = owner(asgi) if self._allow_image_uuid else None
        found = check(path, fields, self._take_era, names)
        return (found, None) if isinstance(found, Refusal) else (None, found)

    def _count(self, asgi: Scope, images: Sequence[ImageReport]) -> None:
        """Count what was done, and leave it for the request log."""
        asgi.setdefault("state", {})[LOGGED] = [image.as_dict() for image in images]
        for image in images:
            labels = (self._policy, image.level or "custom")
            TOKENS_BEFORE.labels(*labels).inc(image.tokens_before or 0)
            TOKENS_AFTER.labels(*labels).inc(image.tokens_after or 0)
            IMAGES.labels(image.source).inc()
            CLAMPED.inc(image.clamped)


_MOST_CONTAINERS: Final = 2**17
"""Lists and objects of a body, by its brackets: to parse ten million takes ten seconds."""
_MOST_VALUES: Final = 2**20
"""By its commas: ten million take seconds too. A prompt of a million token ids is below it."""
_SHALLOW: Final = 500
"""No body with fewer of them is nested too deeply to be parsed."""
_SHAPE: Final = (
    f"the body holds more than {_MOST_CONTAINERS} lists and objects or {_MOST_VALUES} values, or "
    "nests them too deeply; send less at once"
)
_HALF: Final = "the body holds half a character (one of \\ud800 to \\udfff alone); send whole ones"


def _raw_half(body: bytes) -> bool:
    """Tell whether bytes are one of U+D800 to U+DFFF, which is no UTF-8 and yet read by Python."""
    return b"\xed" in body and _RAW_HALF.search(body) is not None


def _path(asgi: Scope) -> str:
    return get_route_path(asgi).rstrip("/")


async def _read(receive: Receive) -> tuple[bytes | None, Receive]:
    """Return a request's body, and what gives it to the application again.

    None where the client has gone before its end.
    """
    parts = list[bytes]()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None, _first(message, receive)
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            body = b"".join(parts)
            return body, _first({"type": "http.request", "body": body}, receive)


def _first(message: Message, receive: Receive) -> Receive:
    """Return a ``receive`` that gives one message before what the server gives."""
    kept = [message]

    async def next_message() -> Message:
        return kept.pop() if kept else await receive()

    return next_message


def _with_body(asgi: Scope, body: bytes, receive: Receive) -> tuple[Scope, Receive]:
    """Return a request whose body is another; the server's own has been read."""
    others = [header for header in asgi["headers"] if header[0] != b"content-length"]
    length = (b"content-length", str(len(body)).encode())
    kept = _first({"type": "http.request", "body": body}, receive)
    return {**asgi, "headers": [*others, length]}, kept
