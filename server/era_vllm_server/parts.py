"""The pictures and videos of a body, each with its place and what its part says of it.

OpenAI's chats and responses have their parts in messages and in what tools answer; Anthropic's
messages have image blocks, which vLLM turns into parts without ``era`` and ``detail``. Leaves out
where ``era`` has no meaning (``fields``), and what it comes to (``requests``).
"""

from collections.abc import Iterator
from typing import Any, Final

from era_vllm.vllm_plugin.parts import FIELD, PartFields, fields_of_items, modality_of, placed_parts
from era_vllm.vllm_plugin.requests import FieldError

MESSAGES: Final = "/v1/messages"
"""It and what is below it have Anthropic's form."""
_SOURCES: Final = {"base64": "data", "url": "url"}
"""Types of an image block's source, and the field that holds the picture or its address."""
_SOURCE: Final = (
    '{"type": "base64", "media_type": "image/png", "data": ...} or {"type": "url", "url": ...}; '
    "send the picture itself, no files are kept here"
)


def item_fields(path: str, body: dict[str, Any]) -> dict[str, list[PartFields]]:
    """Return what is said of each item of a chat, by modality, in the prompt's order.

    Args:
        path: Of its route.
        body: What the route has validated.

    Raises:
        FieldError: a picture that vLLM leaves out, or refuses without a word on what is allowed.
    """
    if path.startswith(MESSAGES):
        return {"image": list(_fields_of_blocks(body)), "video": []}
    name = "messages" if body.get("messages") else "input"
    parts = list(placed_parts(body.get(name), name, ("content", "output")))
    for at, part in parts:
        if isinstance(part, dict) and modality_of(part) == "image" and not part.get("image_url"):
            raise FieldError(f"{at}.image_url", None, "data:image/...;base64,... or https://...")
    return fields_of_items(parts)


def _fields_of_blocks(body: dict[str, Any]) -> Iterator[PartFields]:
    """Yield what is said of each picture of Anthropic's form.

    Upstream: vllm/entrypoints/anthropic/serving.py:406 ``_convert_messages`` (0.32.0) takes images
    of messages only, those of the user's tool results before the message's own.
    """
    found, lost = list[tuple[str, dict[str, Any]]](), list(_blocks(body.get("system"), "system"))
    for row, message in enumerate(body["messages"]):
        at, content, role = f"messages[{row}].content", message["content"], message["role"]
        for place, result in _blocks(content, at, "tool_result"):
            within = _blocks(result.get("content"), f"{place}.content")
            (found if role == "user" else lost).extend(within)
        (lost if role == "system" else found).extend(_blocks(content, at))
    for at, block in lost:
        raise FieldError(at, block, "in a message of the user")
    for at, block in found:
        source = block.get("source")
        kind = source.get("type", "base64") if isinstance(source, dict) else None
        given = source.get(_SOURCES.get(kind)) if isinstance(kind, str) else None
        if not isinstance(given, str) or not given:
            raise FieldError(f"{at}.source", source, _SOURCE)
        within = source.get("detail")  # as in ``image_url``
        name = "detail" if within is None else "source.detail"
        yield PartFields(
            at, block.get(FIELD), block.get("detail") if within is None else within, name
        )


def _blocks(content: object, at: str, kind: str = "image") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield Anthropic's blocks of a type, each with its place."""
    for column, block in enumerate(content if isinstance(content, list) else ()):
        if isinstance(block, dict) and block.get("type") == kind:
            yield f"{at}[{column}]", block
