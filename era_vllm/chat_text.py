"""What a chat template writes around a user's picture and text, as token ids. No vllm, no torch.

A template is asked to render a message with a word in it that no template writes, and what stands
before its picture and behind its text is read off. Leaves out who wants to know
(``vllm_plugin/scout_text.py``, ``lab/scout.py``).
"""

from collections.abc import Sequence
from typing import Any, Final

_WORD: Final = "qwortzq"
_ASKED: Final = f"{_WORD}?"
"""A user's text. Some templates write the sign that ends a question themselves, once."""

Ids = tuple[int, ...]


def text_around(tokenizer: Any, template: str, mark: int | None) -> tuple[Ids, Ids]:  # noqa: ANN401
    """Return what stands before the picture of a user's first message, and from behind its text up
    to where the answer begins.

    Args:
        tokenizer: A Hugging Face one, as are its errors.
        mark: Token id that stands for a picture; without one the picture is where the text begins.

    Raises:
        ValueError: a template that does not render a picture and then a text.
    """
    parts = [{"type": "image"}, {"type": "text", "text": _ASKED}]
    found: Exception | None = None
    for content in (parts, _ASKED):
        messages = [{"role": "user", "content": content}]
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template's own, of any kind
            found = error
            continue
        begin, word, rest = text.partition(_WORD)
        if not word or _WORD in rest:
            continue
        ids, before = _encoded(tokenizer, text), _encoded(tokenizer, begin)
        sign = len(rest) - len(rest.lstrip()) + 1 if rest.lstrip().startswith("?") else 0
        behind = _behind(ids, _encoded(tokenizer, begin + word + rest[:sign]))
        if mark in ids and ids.index(mark) < len(before) and mark not in behind:
            return tuple(ids[: ids.index(mark)]), behind
        if content == _ASKED and mark not in ids:
            return tuple(before), behind
    raise ValueError("no picture and then a text of a user's") from found


def _behind(ids: Sequence[int], begin: Sequence[int]) -> Ids:
    """Return the ids behind those that a text begins with, whose last may have been cut."""
    pairs = enumerate(zip(ids, begin, strict=False))
    same = next((at for at, (one, other) in pairs if one != other), len(begin))
    return tuple(ids[same:])


def _encoded(tokenizer: Any, text: str) -> list[int]:  # noqa: ANN401
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
