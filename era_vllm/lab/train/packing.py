"""Pack a task with all its questions into one row of tokens.

    opening filler <pictures> | question 1 ... answer | question 2 ... answer | ...

What stands left of the first bar is shared. A question sees it and itself, no other question, and
its positions start right behind the pictures, so each is answered as if it were alone. Some rows
are a chat instead: each turn sees the turns before. Positions are M-RoPE's, as transformers counts
them; now and then a stretch of them is left out before the question, as if text had stood there.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from era_vllm.lab.synth.filler import draw_filler
from era_vllm.lab.synth.questions import Question
from era_vllm.lab.synth.tasks import Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NO_TARGET: Final = -100
_MOST: Final = 150
"""Tokens of questions and answers together, one question at least."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a family writes a prompt, and counts positions."""

    opening: str
    asked: str
    """Between a question and its answer."""
    end: str
    """Of an answer."""
    next_turn: str
    marks: tuple[str, str]
    """Around a picture."""
    pads: tuple[str, str]
    """A token of a picture, of a video."""
    side: int
    """Pixels of a token."""
    grid: bool
    """Whether tokens of a picture stand in rows and columns (M-RoPE), or one behind the other."""
    filler: bool
    """Whether the vocabulary has it, and a chat was learnt."""


@dataclass(frozen=True, slots=True)
class Row:
    """A packed task; n tokens."""

    ids: "np.ndarray"
    """[n]"""
    positions: "np.ndarray"
    """[3, n]: time, row, column; without a grid all the same."""
    owners: "np.ndarray"
    """[n]: the question that a token belongs to, from 1; 0: all see it."""
    targets: "np.ndarray"
    """[n]: the token that is to follow, where it is learnt."""
    questions: tuple[Question, ...]
    spans: tuple[tuple[int, int], ...]
    """Where each question's answer is told: from, to, as indices of targets."""


def pack(
    task: Task,
    form: Form,
    words: "Tokenizer",
    lots: random.Random,
    wordy: bool = False,
    extra: int | None = None,
) -> Row:
    """Pack a task.

    Args:    wordy: with long filler before the pictures and before each question.
             extra: as accuracy is measured: so many words of filler before the pictures and before
                 each question (and then all of them), no chat, no stretch left out. None: as is
                 learnt.
    Returns: Row.
    Mutates: lots.
    """
    maker, bare = _Maker(words, form), extra is not None or not form.filler
    before = ""
    if extra or (not bare and (wordy or lots.random() >= 0.7)):
        before = draw_filler(lots, extra or lots.randint(1, 60 if wordy else 8))
    maker.add(form.opening + before)
    for index, item in enumerate(task.items):
        if index and not bare and lots.random() < 0.2:
            maker.add(draw_filler(lots, lots.randint(1, 8)))
        rows, columns = (side // form.side for side in item.frames[0].size[::-1])
        outer = bool(item.seconds) and (bare or lots.random() < 0.7)
        if outer:  # transformers from 5.10 on leaves the template's marks around a video's own
            maker.add(form.marks[0])
        for moment in range(len(item.scenes)):
            if item.seconds:
                maker.add(f"<{item.seconds[moment]:.1f} seconds>")
            maker.add_picture(form.pads[bool(item.seconds)], rows, columns)
        if outer:
            maker.add(form.marks[1])
    chat = not bare and lots.random() < 0.12
    if extra is None and lots.random() < 0.2:
        maker.position += lots.randint(1, 150)
    start, place = len(maker.tokens), maker.position
    asked: list[Question] = []
    spans: list[tuple[int, int]] = []
    for number, question in enumerate(task.questions, 1):
        if not chat:
            maker.position, maker.owner = place, number
        asks = form.next_turn if chat and number > 1 else ""
        if extra or not bare and (wordy or lots.random() < 0.08):
            asks += draw_filler(lots, extra or lots.randint(1, 60 if wordy else 10)) + " "
        marked = bare or lots.random() >= 0.05  # the question mark is left out at times
        asks += question.text if marked else question.text[:-1]
        prompt = maker.encoded(asks + form.asked)
        answer = maker.encoded(question.answer + form.end)
        if asked and len(maker.tokens) - start + len(prompt) + len(answer) > _MOST and not extra:
            break
        maker.extend(prompt)
        spans.append(maker.tell(answer))
        if chat:
            maker.extend(answer[-1:])  # only a later turn sees the end of an answer
        asked.append(question)
    ids, targets, owners, *positions = np.array(maker.tokens, np.int64).T
    return Row(ids, np.stack(positions), owners, targets, tuple(asked), tuple(spans))


class _Maker:
    def __init__(self, words: "Tokenizer", form: Form) -> None:
        self._words, self._form = words, form
        self.position = self.owner = 0
        self.tokens: list[list[int]] = []
        """Of each: id, target, owner; positions in time, rows and columns."""

    def encoded(self, text: str) -> list[int]:
        return self._words.encode(text, add_special_tokens=False).ids

    def add(self, text: str) -> None:
        self.extend(self.encoded(text))

    def extend(self, ids: Sequence[int]) -> None:
        for place, token in enumerate(ids, self.position):
            self.tokens.append([token, NO_TARGET, self.owner, place, place, place])
        self.position += len(ids)

    def tell(self, answer: Sequence[int]) -> tuple[int, int]:
        """Add an answer but for its last token; return where it is told."""
        first = len(self.tokens) - 1
        self.extend(answer[:-1])
        for token, target in zip(self.tokens[first:], answer, strict=True):
            token[1] = target
        return first, first + len(answer)

    def add_picture(self, pad: str, rows: int, columns: int) -> None:
        token = self._words.token_to_id(pad)
        assert token is not None
        self.add(self._form.marks[0])
        start = self.position
        self.extend([token] * (rows * columns))
        if self._form.grid:
            for index, own in enumerate(self.tokens[-rows * columns :]):
                own[3:] = start, start + index // columns, start + index % columns
            self.position = start + max(rows, columns)
        self.add(self._form.marks[1])
