"""The layer that sees each request's body once, before its route: it opens the request's scope.

It refuses what a route would ignore or what would reach another client's picture: ``era`` where it
has no meaning, and names of pictures (``uuid``, rendered ``features``), which vLLM's caches answer
before anybody looks at pixels. Most bodies hold none of these words and are not parsed here. It
also counts the pictures of what is answered.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Final

from starlette._utils import get_route_path  # what the router strips, by the router's rule
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import envs
from vllm.renderers.chat_utils import MM_PARSER_MAP, TEXT_PART_TYPES

from era_vllm.vllm_plugin.requests import FIELD, ImageReport, scope
from era_vllm_server.exchange import Refusal
from era_vllm_server.logs import IMAGES as LOGGED
from era_vllm_server.metrics import CLAMPED, IMAGES, TOKENS_AFTER, TOKENS_BEFORE

OWN_PATHS: Final = "/v1/era/"
"""Routes below it read their bodies themselves."""
_OFFLINE: Final = "image_pil"
"""A part that only offline callers can fill."""
BATCH: Final = "/v1/chat/completions/batch"
_FIELDS: Final = re.compile(rb'"(?:era|uuid|mm_hashes|image_pil)"')
"""A search takes a tenth of the time that to parse a picture would, and no memory."""
_RAW_HALF: Final = re.compile(rb"\xed[\xa0-\xbf]")
_MEDIA: Final = frozenset(MM_PARSER_MAP) - TEXT_PART_TYPES
"""Types of parts, and keys of parts without a type, that hold a picture or the like."""


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
            return _refused("body_shape", _SHAPE), None
        escaped = b"\\" in body
        hidden = b"\x00" in body or (escaped and b"\\u00" in body)  # UTF-16; spelled by escapes
        halves = hidden or (escaped and (b"\\ud" in body or b"\\uD" in body)) or _raw_half(body)
        plain = not (hidden or halves or containers > _SHALLOW or path == BATCH)
        if plain and not _FIELDS.search(body):
            return None, None
        try:
            fields = json.loads(body)
            if halves:
                json.dumps(fields, ensure_ascii=False).encode()
        except RecursionError:  # which not every route takes for a client's error
            return _refused("body_shape", _SHAPE), None
        except UnicodeEncodeError:
            return _refused("body_shape", _HALF), None
        except ValueError:  # the route's to refuse
            return None, None
        if not isinstance(fields, dict):
            return None, None
        if refusal := self._misplaced(path, fields):
            return refusal, None
        if isinstance(features := fields.get("features"), dict) and features.get("mm_hashes"):
            return _refused("image_uuid", _FEATURES), None
        if path == BATCH and isinstance(chats := fields.get("messages"), list):
            most = envs.VLLM_MAX_COMPLETION_PROMPTS
            if len(chats) > most:
                message = f"messages: got {len(chats)} chats, allowed: {most} in one request"
                return _refused("batch", message), None
        parts = list(_parts(fields))
        if any(part.get("type") == _OFFLINE or _OFFLINE in part for part in parts):
            return _refused("image_pil", _PIL), None
        named = [part for part in parts if part.get("uuid") is not None and _is_media(part)]
        if not named:
            return None, None
        if not self._allow_image_uuid:
            return _refused("image_uuid", _UUID), None
        for part in named:
            if not isinstance(part["uuid"], str) or not any(part.get(name) for name in _MEDIA):
                return _refused("image_uuid", _ALONE), None
            part["uuid"] = f"{_owner(asgi)}-{part['uuid']}"
        return None, json.dumps(fields).encode()

    def _misplaced(self, path: str, fields: dict[str, object]) -> Refusal | None:
        """Return why the field ``era`` is refused: nowhere is it ignored."""
        takes = path in self._take_era
        if not takes and not f"{path}/".startswith(OWN_PATHS) and fields.get(FIELD) is not None:
            routes = ", ".join(sorted(self._take_era))
            return _refused(FIELD, f"{FIELD}: got it for {path}, allowed: {routes}; {_LEAVE_OUT}")
        for part in _parts(fields) if takes else ():
            where = part.get("image_url")
            within = isinstance(where, dict) and FIELD in where
            if within or (FIELD in part and not _PART.isdisjoint(part)):
                return _refused(FIELD, f"{FIELD}: got it in a part of a message; {_WHOLE}")
        return None

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
_LEAVE_OUT: Final = "leave it out here"
_WHOLE: Final = (
    "it is a field of the whole request; for one picture alone send detail: high, low or auto"
)
_PART: Final = frozenset({"type", "role", "image_url"})
"""Of these one is in every message and part of a message."""
_PIL: Final = "image_pil: only for callers in Python; send an image_url"
_ALONE: Final = "uuid: got no string, or a name alone; send the picture beside it"
_UUID: Final = (
    "uuid: a name could stand for another client's picture, so names are not taken; leave it out, "
    "or have the server started with --era-allow-image-uuid, which keeps them apart by API key"
)
_FEATURES: Final = (
    "features.mm_hashes: a name could stand for another client's picture, so rendered features are "
    "not taken; send content_parts"
)


def _raw_half(body: bytes) -> bool:
    """Tell whether bytes are one of U+D800 to U+DFFF, which is no UTF-8 and yet read by Python."""
    return b"\xed" in body and _RAW_HALF.search(body) is not None


def _path(asgi: Scope) -> str:
    return get_route_path(asgi).rstrip("/")


def _refused(reason: str, message: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, reason, message)


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


def _parts(fields: dict[str, object]) -> Iterator[dict[str, object]]:
    """Yield every object that stands in a list of a body, wherever that is."""
    left: list[object] = [fields]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [inner for inner in value.values() if inner and isinstance(inner, dict | list)]
        elif isinstance(value, list):
            inner = [part for part in value if part and isinstance(part, dict | list)]
            left += inner
            yield from (part for part in inner if isinstance(part, dict))


def _is_media(part: dict[str, object]) -> bool:
    """Tell whether vLLM takes a part of a message for a picture or the like."""
    kind = part.get("type")
    return (isinstance(kind, str) and kind in _MEDIA) or not _MEDIA.isdisjoint(part)


def _owner(asgi: Scope) -> str:
    """Return what tells one API key from another, and not the key."""
    keys = [value for name, value in asgi["headers"] if name == b"authorization"]
    return hashlib.sha256(b"\n".join(keys)).hexdigest()[:16]
