"""What stands in a body, before its route parses it: bounded in kind and number, then in meaning.

vLLM parses and validates bodies on the loop on which every other request waits, some kinds at a
fifth of a millisecond an item, so each kind has a bound of its own: what passes takes less than
half a second (``deploy/loadtest/bodies.py`` measures it). The layer also opens the request's scope,
and counts the pictures of what is answered. Leaves out what fields mean (``fields``).
"""

import json
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era_vllm.compat.starlette_path import get_route_path
from era_vllm.vllm_plugin.requests import ImageReport, scope
from era_vllm_server.fields import check, owner, refused
from era_vllm_server.metrics import CLAMPED, IMAGES, TOKENS_AFTER, TOKENS_BEFORE
from era_vllm_server.middleware.limits import replay
from era_vllm_server.middleware.log import IMAGES as LOGGED
from era_vllm_server.refusals import Refusal

MOST_PLAIN_BYTES: Final = 2**23
"""Of the body without strings of over 4 KiB that need no escapes, as pictures: to parse 32 MiB of
others takes half a second."""
MOST_BRACKETS: Final = 2**17
MOST_COMMAS: Final = 2**19
"""Of the body's bytes, in its texts too: what is parsed at all takes a tenth of a second."""
MOST_CHARACTERS: Final = 2**22
"""Of all texts that are no picture's, names among them."""
MOST_OBJECTS: Final = 2**13
MOST_DEEP: Final = 100
MOST_MEMBERS: Final = 2**12
"""Of an object, and items of a list, where it does not say otherwise below."""
MOST_OF: Final = {"input": 1024, "choice": 1024, "documents": 1024}
"""By a list's name: what is tried as dozens of types, or compiled."""
NUMBERS: Final = frozenset(
    {"prompt", "prompts", "input", "tokens", "token_ids", "prompt_token_ids"}
)
"""Lists of token ids, which are as long as the body's commas allow."""
_MEDIA: Final = frozenset({"url", "image_url", "video_url", "audio_url", "data", "file_data"})
"""Members that hold a picture's bytes; what reads them has a bound of its own (``media``)."""
_LONG_STRING: Final = re.compile(rb'[^"\\]{4096,}')
_HALF: Final = "the body holds half a character (one of \\ud800 to \\udfff alone); send whole ones"


class Body:
    """The layer, inside of vLLM's authentication."""

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
        self.app = app
        self._take_era = take_era
        self._policy = policy
        self._allow_image_uuid = allow_image_uuid

    async def __call__(self, asgi: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if asgi["type"] != "http":
            await self.app(asgi, receive, send)
            return
        if asgi["method"] in ("POST", "PUT", "PATCH"):
            message = await receive()  # whole: ``limits`` has read it
            body = message.get("body", b"")
            found = self._check(asgi, body)
            if isinstance(found, Refusal):
                await found.answer(asgi, send)
                return
            if found is not None:
                length = (b"content-length", str(len(found)).encode())
                others = [pair for pair in asgi["headers"] if pair[0] != length[0]]
                asgi = {**asgi, "headers": [*others, length]}
            if message["type"] == "http.request":
                receive = replay(body if found is None else found, receive)
        with scope() as request:

            async def counting(message: Message) -> None:
                if message.get("status") == HTTPStatus.OK:  # of a stream before its first event
                    self._count(asgi, request.all_images)
                await send(message)

            await self.app(asgi, receive, counting)

    def _check(self, asgi: Scope, body: bytes) -> Refusal | bytes | None:
        """Return why a body is refused, or what is to be read in its place."""
        if body[:9].lstrip().startswith(b"--"):  # a form's, which no route reads as JSON
            return None
        if len(body) > MOST_PLAIN_BYTES:
            strings = (found.end() - found.start() for found in _LONG_STRING.finditer(body))
            if len(body) - sum(strings) > MOST_PLAIN_BYTES:
                return _too_much(f"{MOST_PLAIN_BYTES} bytes beside its pictures")
        if body.count(b"[") + body.count(b"{") > MOST_BRACKETS:
            return _too_much(f"{MOST_BRACKETS} brackets")
        if body.count(b",") > MOST_COMMAS:
            return _too_much(f"{MOST_COMMAS} commas")
        try:
            fields = json.loads(body)
            if excess := _excess(fields):
                return _too_much(excess)
        except RecursionError:  # which not every route takes for a client's error
            return _too_much(f"{MOST_DEEP} levels")
        except UnicodeEncodeError:
            return refused("body_shape", _HALF)
        except ValueError:  # the route's to refuse
            return None
        if not isinstance(fields, dict):
            return None
        path = get_route_path(asgi).rstrip("/")
        return check(path, fields, self._take_era, owner(asgi) if self._allow_image_uuid else None)

    def _count(self, asgi: Scope, images: Sequence[ImageReport]) -> None:
        """Count what was done, and leave it for the request log."""
        asgi.setdefault("state", {})[LOGGED] = [image.as_dict() for image in images]
        for image in images:
            labels = (self._policy, image.level or "custom")
            TOKENS_BEFORE.labels(*labels).inc(image.tokens_before or 0)
            TOKENS_AFTER.labels(*labels).inc(image.tokens_after or 0)
            IMAGES.labels(image.source).inc()
            CLAMPED.inc(image.clamped)


def _too_much(excess: str) -> Refusal:
    return refused("body_shape", f"the body holds more than {excess}; send less at once")


def _excess(body: object) -> str | None:
    """Return which bound a parsed body is over.

    Raises:
        UnicodeEncodeError: it holds half a character.
    """
    characters = objects = 0
    left: list[tuple[str, object, int]] = [("", [body], 0)]
    while left:
        name, value, depth = left.pop()
        if depth > MOST_DEEP:
            return f"{MOST_DEEP} levels"
        if isinstance(value, dict):
            objects += 1
            if len(value) > MOST_MEMBERS:
                return f"{MOST_MEMBERS} members in {name or 'it'}"
            names, items = list(value), list(value.values())
            characters += len("".join(names).encode())
        else:
            items = value
            kinds = set(map(type, items))
            if kinds <= {int} and name in NUMBERS:
                continue
            most = MOST_OF.get(name, MOST_MEMBERS)
            if len(items) > most:
                return f"{most} items in {name or 'a list'}"
            names = [name] * len(items)
        for at, item in zip(names, items, strict=True):
            if isinstance(item, dict | list):
                left.append((at, item, depth + 1))
            elif isinstance(item, str):
                characters += 0 if at in _MEDIA else len(item)
                if not item.isascii():
                    item.encode()
        if objects > MOST_OBJECTS:
            return f"{MOST_OBJECTS} objects"
        if characters > MOST_CHARACTERS:
            return f"{MOST_CHARACTERS} characters of text"
    return None
