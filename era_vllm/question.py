"""What is asked of a picture or video: which text that is, and its tokens. No vllm, no torch.

In a chat it is the text of the message that holds the item, so that later turns ask the same of it
and find what is cached; in a rendered prompt the text behind the item up to the next one. The first
``MOST`` tokens of it: what stands nearest to the item, and what a prompt that grows at its end
keeps. Special tokens are no part of it. Leaves out who wants to know (``vllm_plugin/renderer.py``,
``lab/asking.py``), and what a policy makes of it (``steps/relevance.py``).
"""

import re
from collections.abc import Mapping, Sequence, Set
from typing import Final, Protocol

MOST: Final = 256
"""Tokens of a question."""
_CHARACTERS: Final = 8192
"""Of a text that are looked at, so that a long one costs no more than a question does."""

Question = tuple[int, ...]
"""Token ids; empty = nothing is asked."""


class _Added(Protocol):
    @property
    def special(self) -> bool: ...


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, _Added]: ...

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, list[int]]: ...

    def decode(self, token_ids: Sequence[int], /) -> str: ...


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that are no text: those of templates, and placeholders of items."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {id_ for id_, one in added if one.special}


def of_text(
    text: str, tokenizer: Tokenizer, left_out: Set[int], suffix: Sequence[int] = ()
) -> Question:
    """Return a text's question.

    Args:
        left_out, suffix: As of ``of_prompt``; a user's own text has no suffix.
    """
    ids = tokenizer(text[:_CHARACTERS], add_special_tokens=False)["input_ids"]
    return _first(ids, left_out, suffix)


def of_prompt(
    ids: Sequence[int],
    marks: Mapping[str, Sequence[int]],
    counts: Mapping[str, int],
    tokenizer: Tokenizer,
    left_out: Set[int],
    suffix: Sequence[int] = (),
) -> dict[str, list[Question]]:
    """Return the question of each item of a rendered prompt, by modality, in its order.

    Args:
        ids: The prompt, where no item has its placeholders yet.
        marks: Modality -> tokens that stand for an item of it.
        counts: Modality -> items.
        left_out: ``special_ids``.
        suffix: What a chat template writes behind a text, which is no part of a question that ends
            with it.

    Raises:
        LookupError: it has more marks than items, so that theirs cannot be told.
    """
    left_out = left_out | {mark[0] for mark in marks.values() if len(mark) == 1}
    found: dict[str, list[Question]] = {modality: [] for modality in counts}
    for modality, text in _behind(ids, marks):
        if modality in found:
            found[modality].append(_first(text, left_out, suffix))
    if any(len(found[modality]) < count for modality, count in counts.items()):
        found = {modality: [] for modality in counts}  # a mark merged with its neighbours
        for modality, text in _behind_text(tokenizer.decode(ids), marks, tokenizer):
            if modality in found:
                found[modality].append(of_text(text, tokenizer, left_out, suffix))
    for modality, count in counts.items():
        if len(found[modality]) > count:
            raise LookupError(f"{len(found[modality])} places for {count} {modality}s")
        found[modality] += [()] * (count - len(found[modality]))  # refused in the processor
    return found


def _first(ids: Sequence[int], left_out: Set[int], suffix: Sequence[int]) -> Question:
    said, end = (tuple(id_ for id_ in some if id_ not in left_out) for some in (ids, suffix))
    if end and said[-len(end) :] == end:
        said = said[: -len(end)]
    return said[:MOST]


def _behind(
    ids: Sequence[int], marks: Mapping[str, Sequence[int]]
) -> list[tuple[str, Sequence[int]]]:
    """Return each mark's modality, with the tokens up to the next mark."""
    first = {mark[0] for mark in marks.values()}
    places: list[tuple[int, str]] = []
    for at in (at for at, token in enumerate(ids) if token in first):
        for modality, mark in marks.items():
            if list(ids[at : at + len(mark)]) == list(mark):
                places.append((at, modality))
                break
    starts = [at for at, _ in places] + [len(ids)]
    return [
        (modality, ids[at + len(marks[modality]) : starts[number]])
        for number, (at, modality) in enumerate(places, 1)
    ]


def _behind_text(
    prompt: str, marks: Mapping[str, Sequence[int]], tokenizer: Tokenizer
) -> list[tuple[str, str]]:
    """Return the same of a text."""
    names = {tokenizer.decode(mark): modality for modality, mark in marks.items()}
    _, *parts = re.split(f"({'|'.join(map(re.escape, names))})", prompt)
    return [(names[mark], text) for mark, text in zip(parts[::2], parts[1::2], strict=True)]
