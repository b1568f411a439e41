"""What stands in a body, before its route parses it: bounded in kind and number, then in meaning.

vLLM parses and validates bodies on the loop on which every other request waits, some kinds at a
fifth of a millisecond an item, so each kind has a bound of its own: what passes takes less than
half a second (``deploy/loadtest/bodies.py`` measures it). The layer also opens the request's
context, and counts the pictures of what is answered. Leaves out what fields mean (``fields``).
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era_vllm.compat.starlette_path import get_route_path
from era_vllm.vllm_plugin.requests import ItemReport, request_context
from era_vllm_server.fields import arguments, check, owner
from era_vllm_server.metrics import CLAMPED, ITEMS, TOKENS_AFTER, TOKENS_BEFORE
from era_vllm_server.middleware.limits import replay
from era_vllm_server.middleware.log import ITEMS as LOGGED
from era_vllm_server.refusals import Refusal

MAX_BYTES_OF: Final = {b"[{": 2**17, b",": 2**19, b'"': 2**20, b"\\": 2**20}
"""Of the body's bytes, in its texts too: what is parsed at all takes a fifth of a second."""
MAX_DIGITS: Final = 640
"""Of a whole number; Python's own bound is 4300, and its time their square."""
MAX_ALL_DIGITS: Final = 2**23
"""Of all numbers together; of base64 a sixth is digits, 5 million of the largest body."""
MAX_CHARACTERS: Final = 2**22
"""Of all texts that are no picture's, names among them."""
MAX_OBJECTS: Final = 2**13
MAX_ITEMS: Final = 2**14
"""Of all lists, but whole numbers: token ids are as many as the commas."""
MAX_DEPTH: Final = 100
MAX_MEMBERS: Final = 2**12
"""Of an object, and items of a list, where it does not say otherwise below."""
MAX_OF: Final = {
    **{"input": 1024, "choice": 1024, "documents": 1024, "bad_words": 128},
    "enum": MAX_ITEMS,
}
"""By a list's name: what is tried as dozens of types, or compiled."""
MAX_REPETITIONS: Final = 1000
"""Of a pattern, by its counted repetitions: a grammar is made of each on the loop, in their square.
"""
MAX_COMPILED: Final = 2**16
"""Characters of what an answer must follow (choices, names, constants, patterns): the engine
compiles them for a second, 256 Ki for 10 s, whether or not the client has left."""
_NO_NUMBERS: Final = frozenset({"content", "messages"})
"""Lists that hold no token ids: each number in them is tried as every kind of part."""
_COMPILED: Final = frozenset(
    {"choice", "const", "enum", "pattern", "regex", "grammar", "json", "structural_tag"}
    | {"begin", "end", "guided_choice", "guided_regex", "guided_grammar", "guided_json"}
    | {"schema", "parameters", "bad_words"}
)
"""Members of which all is compiled (bad words: made tokens on the loop), names within too,"""
_PROSE: Final = frozenset({"description", "title", "examples", "default", "$comment"})
"""but for these."""
_COUNT: Final = re.compile(r"(\))?\{(\d{1,9})?(?:,(\d{1,9})?)?\}")
TEXT_SHARE: Final = {"/tokenize": 8}
"""Route -> share of the characters: where each comes back as a token, and a token as a text."""
_MEDIA: Final = frozenset({"url", "image_url", "video_url", "audio_url", "data", "file_data"})
"""Members that hold a picture's bytes; what reads them has a bound of its own (``media``)."""
_HALF: Final = "the body holds half a character (one of \\ud800 to \\udfff alone); send whole ones"


@dataclass(frozen=True, slots=True)
class Body:
    """The layer, inside of vLLM's authentication."""

    app: ASGIApp
    take_era: frozenset[str]
    """Paths whose bodies may have the field ``era``."""
    policy: str
    """Label of what is counted."""
    allow_image_uuid: bool
    """Put a client's names apart by its key, instead of refusing them."""
    modalities: Callable[[], tuple[str, ...]]
    """What the model takes."""

    def __post_init__(self) -> None:
        sys.set_int_max_str_digits(MAX_DIGITS)

    async def __call__(self, asgi: Scope, receive: Receive, send: Send) -> None:
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
        with request_context() as request:

            async def counting(message: Message) -> None:
                if message.get("status") == HTTPStatus.OK:  # of a stream before its first event
                    self._count(asgi, request.all_items)
                await send(message)

            await self.app(asgi, receive, counting)

    def _check(self, asgi: Scope, body: bytes) -> Refusal | bytes | None:
        """Return why a body is refused, or what is to be read in its place."""
        if body[:9].lstrip().startswith(b"--"):  # a form's, which no route reads as JSON
            return None
        for kinds, most in MAX_BYTES_OF.items():
            if sum(body.count(kind) for kind in kinds) > most:
                return _too_much(f"{most} of {kinds.decode()}")
        if len(body) > MAX_ALL_DIGITS + len(body.translate(None, b"0123456789")):
            return _too_much(f"{MAX_ALL_DIGITS} digits")
        try:
            fields = json.loads(body)
            path = get_route_path(asgi).rstrip("/")
            if excess := excess_of(path, fields):
                return _too_much(excess)
        except RecursionError:  # which not every route takes for a client's error
            return _too_much(f"{MAX_DEPTH} levels")
        except UnicodeEncodeError:
            return Refusal("body_shape", _HALF)
        except ValueError:  # the route's to refuse
            return None
        if not isinstance(fields, dict):
            return None
        sender = owner(asgi) if self.allow_image_uuid else None
        return check(path, fields, self.take_era, sender, self.modalities())

    def _count(self, asgi: Scope, items: Sequence[tuple[str, ItemReport]]) -> None:
        """Count what was done, and leave it for the request log."""
        asgi.setdefault("state", {})[LOGGED] = [(name, one.as_dict()) for name, one in items]
        for modality, one in items:
            labels = (self.policy, one.level or "custom")
            TOKENS_BEFORE[modality].labels(*labels).inc(one.tokens_before or 0)
            TOKENS_AFTER[modality].labels(*labels).inc(one.tokens_after or 0)
            ITEMS[modality].labels(one.source).inc()
            CLAMPED[modality].inc(one.clamped)


def _too_much(excess: str) -> Refusal:
    return Refusal("body_shape", f"the body holds more than {excess}; send less at once")


def excess_of(path: str, body: object) -> str | None:
    """Return which bound a parsed body is over.

    Raises:
        UnicodeEncodeError: it holds half a character.
    """
    max_characters = MAX_CHARACTERS // TEXT_SHARE.get(path, 1)
    data = arguments(path, body)
    characters = compiled = objects = items = 0
    left: list[tuple[str, dict[str, object] | list[object], int, bool | None]] = []
    left.append(("", [body], 0, False))
    while left:  # within: what is compiled; None = what is data, wherever it says it is a pattern
        name, value, depth, within = left.pop()
        if depth > MAX_DEPTH:
            return f"{MAX_DEPTH} levels"
        if isinstance(value, dict):
            objects += 1
            characters += len("".join(value).encode())
            compiled += len("".join(value)) if within else 0
            named = value.items()
            if len(value) > MAX_MEMBERS:
                return f"{MAX_MEMBERS} members in {name or 'it'}"
            schema = name == "patternProperties" and within is not None
            if characters <= max_characters and any(map(_repeats_much, value if schema else ())):
                return f"{MAX_REPETITIONS} repetitions in a pattern"
        elif name not in _NO_NUMBERS and set(map(type, value)) <= {int}:
            continue
        else:
            items += len(value)
            named = ((name, item) for item in value)
            if len(value) > (most := MAX_OF.get(name, MAX_MEMBERS)):
                return f"{most} items in {name or 'a list'}"
        for at, item in named:
            follows = (within or at in _COMPILED) and at not in _PROSE
            if within is None or id(item) in data:
                follows = None
            if isinstance(item, dict | list):
                left.append((at, item, depth + 1, follows))
            elif isinstance(item, str):
                characters += 0 if at in _MEDIA else len(item)
                compiled += len(item) if follows else 0
                pattern = follows and at in ("pattern", "regex")
                if pattern and compiled <= MAX_COMPILED and _repeats_much(item):
                    return f"{MAX_REPETITIONS} repetitions in a pattern"
                if not item.isascii():
                    item.encode()
        if objects > MAX_OBJECTS:
            return f"{MAX_OBJECTS} objects"
        if compiled > MAX_COMPILED:
            return f"{MAX_COMPILED} characters of choices, bad words, constants, names and patterns"
        if items > MAX_ITEMS:
            return f"{MAX_ITEMS} items"
        if characters > max_characters:
            return f"{max_characters} characters of text"
    return None


def _repeats_much(pattern: str) -> bool:
    """Tell whether a pattern's counts add up to too much; those of groups multiply the others."""
    total, groups = 0, 1
    for group, least, most in _COUNT.findall(pattern):
        count = max(int(least or 0), int(most or 0), 1)
        total += count
        groups *= count if group else 1
    return total > MAX_REPETITIONS or groups > MAX_REPETITIONS
