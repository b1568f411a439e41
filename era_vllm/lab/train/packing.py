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
    most: int = 150,
    wordy: bool = False,
    extra: int | None = None,
) -> Row:
    """Pack a task.

    Args:    most: tokens of questions and answers together, one question at least.
             wordy: with long filler before the pictures and before each question.
             extra: as accuracy is measured: so many words of filler before the pictures and before
                 each question (and then all of them), no chat, no stretch left out. None: as is
                 learnt.
    Returns: Row.
    Mutates: lots.
    """
    maker, bare = _Maker(words, form), extra is not None or not form.filler
    before = draw_filler(lots, extra) if extra else _filler_before(lots, wordy, bare)
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
    start, place = len(maker.ids), maker.position
    asked: list[Question] = []
    spans: list[tuple[int, int]] = []
    for number, question in enumerate(task.questions, 1):
        if not chat:
            maker.position, maker.owner = place, number
        filler = draw_filler(lots, extra) + " " if extra else ""
        if not bare and (wordy or lots.random() < 0.08):
            filler = draw_filler(lots, lots.randint(1, 60 if wordy else 10)) + " "
        turn = form.next_turn if chat and number > 1 else ""
        prompt = maker.encoded(turn + filler + _wording(question, lots, bare) + form.asked)
        answer = maker.encoded(question.answer + form.end)
        if asked and len(maker.ids) - start + len(prompt) + len(answer) > most and not extra:
            break
        maker.extend(prompt)
        spans.append(maker.tell(answer))
        if chat:
            maker.extend(answer[-1:])  # only a later turn sees the end of an answer
        asked.append(question)
    return maker.row(asked, spans)


def _filler_before(lots: random.Random, wordy: bool, bare: bool) -> str:
    if bare or (not wordy and lots.random() < 0.7):
        return ""
    return draw_filler(lots, lots.randint(1, 60 if wordy else 8))


def _wording(question: Question, lots: random.Random, plain: bool) -> str:
    """Leave the question mark out at times."""
    return question.text[:-1] if not plain and lots.random() < 0.05 else question.text


class _Maker:
    def __init__(self, words: "Tokenizer", form: Form) -> None:
        self._words, self._form = words, form
        self.ids: list[int] = []
        self.position = 0
        self.owner = 0
        self._owners: list[int] = []
        self._targets: list[int] = []
        self._positions: list[tuple[int, int, int]] = []

    def encoded(self, text: str) -> list[int]:
        return self._words.encode(text, add_special_tokens=False).ids

    def add(self, text: str) -> None:
        self.extend(self.encoded(text))

    def extend(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self._targets += [NO_TARGET] * len(ids)
        self._owners += [self.owner] * len(ids)
        places = range(self.position, self.position + len(ids))
        self._positions += [(place, place, place) for place in places]
        self.position += len(ids)

    def tell(self, answer: Sequence[int]) -> tuple[int, int]:
        """Add an answer but for its last token; return where it is told."""
        first = len(self.ids) - 1
        self.extend(answer[:-1])
        self._targets[first:] = answer
        return first, first + len(answer)

    def add_picture(self, pad: str, rows: int, columns: int) -> None:
        token = self._words.token_to_id(pad)
        assert token is not None
        self.add(self._form.marks[0])
        start, first = self.position, len(self.ids)
        self.extend([token] * (rows * columns))
        if self._form.grid:
            places = ((row, column) for row in range(rows) for column in range(columns))
            self._positions[first:] = [(start, start + row, start + at) for row, at in places]
            self.position = start + max(rows, columns)
        self.add(self._form.marks[1])

    def row(self, asked: Sequence[Question], spans: Sequence[tuple[int, int]]) -> Row:
        ids = np.array(self.ids, np.int64)
        targets = np.array(self._targets, np.int64)
        positions = np.array(self._positions, np.int64).T
        owners = np.array(self._owners, np.int64)
        return Row(ids, positions, owners, targets, tuple(asked), tuple(spans))
