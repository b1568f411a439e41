"""The demo's first part: the same questions to a server without pruning and to one with it.

Asks over the OpenAI API, counts image tokens by what the servers charge for (the prompt with the
picture less the prompt without), and prints a table. Leaves out starting servers
(``servers.py``).
"""

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Final

from openai import DefaultHttpxClient, OpenAI

from era_vllm.lab.progress import bar
from era_vllm.lab.samples import Sample

_TIMEOUT_S: Final = 120.0
_MAX_TOKENS: Final = 8
_PICTURES_AT_ONCE: Final = 4
_COLUMNS: Final = (40, 13, 13, 10)


@dataclass(frozen=True, slots=True)
class Answered:
    """One question about one sample picture, at each rate."""

    file: str
    family: str
    question: str
    right: str
    answers: tuple[str, ...]
    image_tokens: tuple[int, ...]
    """What the servers charged for the picture, counted with its first question."""

    def is_right(self, rate: int) -> bool:
        """Whether the answer at the rate of this index is exactly right."""
        return self.answers[rate] == self.right


class Asker:
    """A client of one server, for its only model."""

    def __init__(self, url: str) -> None:
        """Connect, past any proxy: the server is on this machine."""
        self._client = OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=_TIMEOUT_S,
            http_client=DefaultHttpxClient(trust_env=False),
        )
        self._model = self._client.models.list().data[0].id

    def ask(self, question: str, picture: str | None) -> tuple[str, int]:
        """Return an answer in lower case, and the tokens of the prompt.

        Args:
            question: One sentence.
            picture: A data: URL, or None for the question alone.
        """
        parts: list[dict[str, object]] = [{"type": "text", "text": question}]
        if picture is not None:
            parts.insert(0, {"type": "image_url", "image_url": {"url": picture}})
        reply = self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": parts}],  # type: ignore[misc, list-item]
            max_tokens=_MAX_TOKENS,
            temperature=0,
        )
        assert reply.usage is not None
        text = reply.choices[0].message.content or ""
        return text.strip().lower(), reply.usage.prompt_tokens


def ask_all(urls: Sequence[str], samples: Sequence[Sample]) -> list[Answered]:
    """Put every question about every sample to every server.

    Args:
        urls: One server a rate.
        samples: Pictures with questions.
    """
    askers = [Asker(url) for url in urls]
    answered: list[list[Answered]] = [[] for _ in samples]
    with (
        bar(sum(len(sample.questions) for sample in samples), "asking", "question") as shown,
        ThreadPoolExecutor(_PICTURES_AT_ONCE) as pool,
    ):
        asking = {pool.submit(_ask_about, askers, sample): i for i, sample in enumerate(samples)}
        for done in as_completed(asking):
            answered[asking[done]] = done.result()
            shown.update(len(done.result()))
    return [item for of_picture in answered for item in of_picture]


def table(answered: Sequence[Answered], rates: Sequence[float]) -> str:
    """Return the first question of each picture as a table, and counts over all questions."""
    heads = ["question", *(f"rate {rate:g}" for rate in rates), "right", "image tokens"]
    lines = [_row(heads), _row(["-" * (width - 2) for width in _COLUMNS] + ["-" * 12])]
    shown: set[str] = set()
    for item in answered:
        if item.file in shown:
            continue
        shown.add(item.file)
        marked = [
            f"{answer:9} {'ok' if item.is_right(index) else 'x'}"
            for index, answer in enumerate(item.answers)
        ]
        tokens = " -> ".join(map(str, item.image_tokens))
        lines.append(_row([item.question, *marked, item.right, tokens]))
    lines.append("")
    for index, rate in enumerate(rates):
        right = sum(item.is_right(index) for item in answered)
        lines.append(f"rate {rate:<5g} {right} of all {len(answered)} questions right")
    same = sum(len(set(item.answers)) == 1 for item in answered)
    lines.append(f"           {same} of {len(answered)} answers are the same at both rates")
    return "\n".join(lines)


def _ask_about(askers: Sequence[Asker], sample: Sample) -> list[Answered]:
    picture = _data_url(sample)
    first = sample.questions[0].text
    bare = [asker.ask(first, None)[1] for asker in askers]
    tokens = tuple(
        asker.ask(first, picture)[1] - text for asker, text in zip(askers, bare, strict=True)
    )
    return [
        Answered(
            sample.file,
            question.family,
            question.text,
            question.answer,
            tuple(asker.ask(question.text, picture)[0] for asker in askers),
            tokens,
        )
        for question in sample.questions
    ]


def _row(cells: Sequence[str]) -> str:
    padded = [f"{cell:{width}}" for cell, width in zip(cells, _COLUMNS, strict=False)]
    return "".join([*padded, *cells[len(_COLUMNS) :]]).rstrip()


def _data_url(sample: Sample) -> str:
    buffer = io.BytesIO()
    sample.image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
