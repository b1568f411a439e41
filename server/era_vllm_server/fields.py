"""What the fields of a parsed body mean, wherever they are sent: which are refused or rewritten.

A route would ignore ``era`` where it has no meaning, and what only looks like it; and a name of a
picture (``uuid``, rendered ``features``) would reach another client's, since vLLM's caches answer
it before anybody looks at pixels. Leaves out how bodies are read (``middleware.body``), and what
``era`` and the pictures of a chat say (``routes``).
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Collection, Container, Iterator
from typing import Final

from starlette.types import Scope
from vllm import envs

from era_vllm.compat.vllm_entrypoints import MM_PARSER_MAP, TEXT_PART_TYPES
from era_vllm.config import LEVELS
from era_vllm.vllm_plugin.parts import FIELD, modality_of
from era_vllm_server.refusals import Refusal

OWN_PATHS: Final = "/v1/era/"
"""Routes below it read their bodies themselves."""
MESSAGES: Final = "/v1/messages"
"""It and what is below it have Anthropic's form."""
BATCH: Final = "/v1/chat/completions/batch"
_OFFLINE: Final = "image_pil"
"""A part that only offline callers can fill."""
_NEAR: Final = (
    r"(?i:.?era|e.ra|er.a|era.|ear|rea"
    r"|(?:x[-_])?era(?:[-_. ][\w. -]{0,40}|level|rate|prun\w{0,20})?"
    r"|(?:image|token|visual)?[-_]?prun(?:e|ing)[-_]?(?:rate|ratio|level))"
)
"""``era`` in capitals, one letter too many or two swapped, and names that hold it or its fields."""
_NEAR_NAME: Final = re.compile(_NEAR)
_WRAPPER: Final = "extra_body"
"""An argument of openai-python, which puts what it holds at the top level."""
_MEDIA: Final = frozenset(MM_PARSER_MAP) - TEXT_PART_TYPES
"""Types of parts, and keys of parts without a type, that hold a picture or the like."""
_FOREIGN: Final = frozenset(
    {*(name for name in _MEDIA if name.startswith(("video", "audio"))), "input_audio"}
    | {"input_video", "video", "audio"}
)
"""What pictures alone do not include; else each route would refuse it in words of its own."""
_PICTURES_ALONE: Final = "this model takes text and pictures only (allowed: image_url, input_image)"
_VIDEOS_TOO: Final = (
    "this model takes text, pictures and videos only (allowed: image_url, input_image, video_url)"
)
_IN_CHATS: Final = "videos are taken in chats only (video_url, /v1/chat/completions)"
_TAKE_VIDEO: Final = ("/v1/chat/completions", "/v1/chat/completions/batch", "/tokenize")
_SPOKEN: Final = ("messages", "input", "system", "content_parts")
"""Fields whose parts a model is given,"""
_WITHIN: Final = ("content", "output")
"""and those of a message or part that hold further ones."""
_OBJECTS: Final = ("image_url", "video_url", "source")
"""Objects of a part that hold the picture or its address."""
_TOP: Final = f'put {{"{FIELD}": {{"level": "strong"}}}} at the top level of the body'
_BESIDE: Final = f'put {{"{FIELD}": {{"level": "strong"}}}} beside the url or source of its part'
_WHERE: Final = (
    "allowed: at the top level of the body, or in the part of a picture or video, beside its url "
    "or source"
)
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


def check(
    path: str,
    fields: dict[str, object],
    take_era: Collection[str],
    owner: str | None,
    modalities: tuple[str, ...],
) -> Refusal | bytes | None:
    """Return why a body is refused, or what is to be read in its place.

    Args:
        take_era: Paths that have the field ``era``.
        owner: Who sends it, to keep names of pictures apart; None = no names are taken.
        modalities: What the model takes.

    Mutates: fields.
    """
    if refusal := _misplaced(path, fields, take_era):
        return refusal
    if isinstance(features := fields.get("features"), dict) and features.get("mm_hashes"):
        return Refusal("image_uuid", _FEATURES)
    if path == BATCH and isinstance(chats := fields.get("messages"), list):
        most = envs.VLLM_MAX_COMPLETION_PROMPTS
        if len(chats) > most:
            message = f"messages: got {len(chats)} chats, allowed: {most} in one request"
            return Refusal("batch", message)
    data = arguments(path, fields)
    parts = list(_parts(fields, data))
    if any(part.get("type") == _OFFLINE or _OFFLINE in part for part in parts):
        return Refusal("image_pil", _PIL)
    videos = "video" in modalities
    foreign = _FOREIGN - {"video_url"} if videos and path in _TAKE_VIDEO else _FOREIGN
    for part in _parts({name: fields.get(name) for name in _SPOKEN}, data):
        kinds = [part["type"]] if "type" in part else list(_MEDIA & part.keys())
        if any(isinstance(kind, str) and kind in foreign for kind in kinds):
            said = _VIDEOS_TOO if videos else _PICTURES_ALONE
            if videos and str(kinds[0]).startswith(("video", "input_video")):
                said = said if path in _TAKE_VIDEO else _IN_CHATS
            return Refusal("media", f"{kinds[0]}: got it in a message, but {said}; leave it out")
    named = [part for part in parts if part.get("uuid") is not None and _is_media(part)]
    if named and owner is None:
        return Refusal("image_uuid", _UUID)
    for part in named:
        if not isinstance(part["uuid"], str) or not any(part.get(name) for name in _MEDIA):
            return Refusal("image_uuid", _ALONE)
        part["uuid"] = f"{owner}-{part['uuid']}"
    return json.dumps(fields).encode() if named else None


def _misplaced(path: str, fields: dict[str, object], take_era: Collection[str]) -> Refusal | None:
    """Return why ``era``, or what was meant for it, is refused: nowhere is it ignored."""
    own, takes = f"{path}/".startswith(OWN_PATHS), path in take_era
    elsewhere = f"got it for {path}, allowed: {', '.join(sorted(take_era))}; leave it out here"
    if not takes and not own and fields.get(FIELD) is not None:
        return Refusal(FIELD, f"{FIELD}: {elsewhere}")
    for name, value in fields.items():
        within = value if name == _WRAPPER and isinstance(value, dict) else ()
        if ours := next((each for each in within if _NEAR_NAME.fullmatch(each)), None):
            return Refusal(FIELD, f"{_WRAPPER}: got {ours!r} in it, which nobody reads; {_TOP}")
        if name != FIELD and _is_near(name, value):
            return Refusal(FIELD, f"{name}: no such field, needed {FIELD!r}; {_TOP}")
    for at, part in () if own else _placed(fields):
        if not takes and part.get(FIELD) is not None:
            return Refusal(FIELD, f"{at}.{FIELD}: {elsewhere}")
        if why := _misplaced_within(part, path.startswith(MESSAGES)):
            return Refusal(FIELD, f"{at}.{why}")
    return None


def _misplaced_within(part: dict[str, object], blocks: bool) -> str | None:
    """Return why a message, or a part of one (of Anthropic's form: ``blocks``), is refused."""
    kind = part.get("type")
    is_item = kind == "image" if blocks else modality_of(part) is not None
    if not is_item and part.get(FIELD) is not None:
        what = f"a part of type {reprlib.repr(kind)}" if "role" not in part else "a message"
        return f"{FIELD}: got it in {what}, {_WHERE}"
    for name, value in part.items() if is_item else ():
        if name != FIELD and _is_near(name, value):
            return f"{name}: no such field, needed {FIELD!r}; {_BESIDE}"
    for place in _OBJECTS:
        within = part.get(place)
        for name, value in within.items() if isinstance(within, dict) else ():
            if _is_near(name, value):
                return f"{place}.{name}: no such field; {_BESIDE}"
    return None


def _is_near(name: str, value: object) -> bool:
    """Tell whether a field that is no ``era`` was meant for it, or is one where there is none."""
    level = name == "level" and isinstance(value, str) and value in dict(LEVELS)
    return value is not None and (level or _NEAR_NAME.fullmatch(name) is not None)


def _placed(
    value: object, at: str = "", names: tuple[str, ...] = _SPOKEN
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield every message of a body, and every part of one, with its place."""
    if isinstance(value, dict):
        for name in names:
            if isinstance(inner := value.get(name), list):
                yield from _placed(inner, f"{at}.{name}" if at else name, _WITHIN)
    elif isinstance(value, list):
        for row, inner in enumerate(value):
            if isinstance(inner, dict):
                yield f"{at}[{row}]", inner
            if isinstance(inner, dict | list):
                yield from _placed(inner, f"{at}[{row}]", _WITHIN)


def owner(asgi: Scope) -> str:
    """Return what tells one API key from another, and not the key."""
    keys = [value for name, value in asgi["headers"] if name == b"authorization"]
    return hashlib.sha256(b"\n".join(keys)).hexdigest()[:16]


def arguments(path: str, fields: object) -> frozenset[int]:
    """Return the ``id`` of all that tools were called with in a conversation of Anthropic's form.

    That is JSON of the model's own, given back to it as text: no part of it is a picture or a
    grammar, whatever its members are called.
    """
    if not (path.startswith(MESSAGES) and isinstance(fields, dict)):
        return frozenset()
    said = fields.get("messages")
    contents = [one.get("content") for one in _objects(said)]
    blocks = [block for content in contents for block in _objects(content)]
    given = [block.get("input") for block in blocks if block.get("type") == "tool_use"]
    return frozenset(id(one) for one in given if isinstance(one, dict))  # a text may be shared


def _objects(value: object) -> list[dict[str, object]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _parts(fields: dict[str, object], data: Container[int]) -> Iterator[dict[str, object]]:
    """Yield every object that stands in a list of a body, but in ``data`` (see ``arguments``)."""
    left: list[object] = [fields]
    while left:
        value = left.pop()
        if id(value) in data:
            continue
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
