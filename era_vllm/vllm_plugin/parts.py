"""What a part of a message says of its own picture or video. No vllm or torch import.

A part may say how much of its item is pruned: by a field ``era`` of its own, or by OpenAI's
``detail``. Leaves out what that comes to (``requests``), and which routes have such parts.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

FIELD: Final = "era"
_TYPES: Final = {
    **dict.fromkeys(("image_url", "input_image", "image_pil"), "image"),
    "video_url": "video",
}
"""Type of a part -> modality."""
_KEYS: Final = (
    *("image_url", "image_pil", "image_embeds", "audio_embeds", "video_embeds", "prompt_embeds"),
    *("audio_url", "input_audio", "video_url"),
)
"""In the order in which vLLM looks for them where a part has no type, or a name."""
_URLS: Final = {"image": "image_url", "video": "video_url"}


@dataclass(frozen=True, slots=True)
class PartFields:
    """What a part says of its item, as it came."""

    at: str = ""
    """Place of the part in the body; empty = it is the body."""
    era: object = None
    """None = nothing."""
    detail: object = None
    detail_at: str = "detail"
    """Place of that in the part."""

    def place(self, field: str) -> str:
        """Return the place of one of the part's fields in the body."""
        return f"{self.at}.{field}" if self.at else field


def placed_parts(
    messages: object, at: str = "messages", names: tuple[str, ...] = ("content",)
) -> Iterator[tuple[str, object]]:
    """Yield every part of a chat's messages, with its place.

    Args:
        messages: As in a chat request; anything else has none.
        at: Their place in the body.
        names: Fields of a message that hold its parts.
    """
    for row, message in enumerate(messages if isinstance(messages, list) else ()):
        for name in names if isinstance(message, dict) else ():
            content = message.get(name)
            for column, part in enumerate(content if isinstance(content, list) else ()):
                yield f"{at}[{row}].{name}[{column}]", part


def texts_of_items(messages: object) -> dict[str, list[str]]:
    """Return what is said beside each item in its own message, by modality, in the prompt's order.

    Args:
        messages: As in a chat request; anything else has none.
    """
    found: dict[str, list[str]] = {modality: [] for modality in _URLS}
    for message in messages if isinstance(messages, list) else ():
        parts = [part for _, part in placed_parts([message])]
        kinds = [modality_of(part) if isinstance(part, dict) else None for part in parts]
        text = "\n".join(
            said
            for part, kind in zip(parts, kinds, strict=True)
            if kind is None and (said := _text_of(part))
        )
        for kind in kinds:
            if kind is not None:
                found[kind].append(text)
    return found


def _text_of(part: object) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else ""


def fields_of_items(parts: Iterable[tuple[str, object]]) -> dict[str, list[PartFields]]:
    """Return what each item's part says, by modality, in the prompt's order.

    Args:
        parts: Each with its place.
    """
    found: dict[str, list[PartFields]] = {modality: [] for modality in _URLS}
    for at, part in parts:
        if isinstance(part, dict) and (modality := modality_of(part)):
            found[modality].append(_fields(at, part, _URLS[modality]))
    return found


def modality_of(part: Mapping[str, object]) -> str | None:
    """Return the modality of what a part of a message holds; None = neither picture nor video.

    Upstream: vllm/renderers/chat_utils.py:1699 ``_parse_chat_message_content_mm_part`` (0.32.0).
    """
    kind = part.get("type")
    if kind is None or part.get("uuid") is not None:
        kind = next((name for name in _KEYS if name in part), None)
    return _TYPES.get(kind) if isinstance(kind, str) else None


def _fields(at: str, part: Mapping[str, object], key: str) -> PartFields:
    url = part.get(key)
    within = url.get("detail") if isinstance(url, dict) else None
    if within is not None:
        return PartFields(at, part.get(FIELD), within, f"{key}.detail")
    return PartFields(at, part.get(FIELD), part.get("detail"))


def with_lists(messages: Iterable[object]) -> list[object]:
    """Return messages whose contents can be read twice: validation makes iterators of some.

    Upstream: vllm/renderers/chat_utils.py:1825 ``has_non_text_content`` (0.32.0) says so.
    """
    return [
        {**message, "content": list(message["content"])}
        if isinstance(message, dict) and not isinstance(message.get("content"), str | list | None)
        else message
        for message in messages
    ]


def without_field(
    messages: Iterable[object], names: tuple[str, ...] = ("content",)
) -> list[object]:
    """Return messages whose parts have no ``era``, which vLLM would hand to the chat template.

    Args:
        messages: With lists of parts; none is changed.
        names: Fields of a message that hold its parts.
    """
    return [
        {
            name: list(map(_bare, value)) if name in names and isinstance(value, list) else value
            for name, value in message.items()
        }
        if isinstance(message, dict)
        else message
        for message in messages
    ]


def _bare(part: object) -> object:
    if isinstance(part, dict) and FIELD in part:
        return {name: value for name, value in part.items() if name != FIELD}
    return part
