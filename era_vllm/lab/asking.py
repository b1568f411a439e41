"""Put questions about pictures to a model: one protocol, answered by transformers or a server.

An asker answers at one pruning rate. Leaves out the engine in this process (``bench/engines.py``
has its asker), pictures (``samples.py``, ``synth/``) and how often answers are right
(``accuracy.py``).
"""

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

from era_vllm.config import EraConfig
from era_vllm.lab.oracle import Oracle, segments_of
from era_vllm.lab.samples import Sample
from era_vllm.lab.screen import bar
from era_vllm.lab.synth.dataset import Example
from era_vllm.lab.synth.questions import Question

MAX_TOKENS: Final = 8
"""Of an answer; the longest right one has three words, then the end."""
_TIMEOUT_S: Final = 120.0
_PICTURES_AT_ONCE: Final = 4
Picture = Example | Sample
"""What is asked about: a picture with its questions, at least one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says to one question: in lower case, words joined with blanks ("7 0")."""

    text: str
    image_tokens: int
    """Of the picture, after pruning."""

    def is_right(self, question: Question) -> bool:
        """Whether it is exactly right."""
        return self.text == question.answer


class Asker(Protocol):
    """A model at one pruning rate; decodes greedily."""

    def ask(self, pictures: Sequence[Picture]) -> list[list[Answer]]:
        """Return for each picture its answers, in the order of its questions."""
        ...


def prompt_of(question: str) -> str:
    """Return LLaVA's prompt about one picture."""
    return f"USER: <image>\n{question} ASSISTANT:"


def cleaned(text: str) -> str:
    """Return an answer as it is compared."""
    return text.strip().lower()


class TransformersAsker:
    """Asks plain transformers: the reference that the engine is held against. Imports no vLLM."""

    def __init__(self, oracle: Oracle, config: EraConfig, rate: float) -> None:
        self._oracle, self._config, self._rate = oracle, config, rate

    def ask(self, pictures: Sequence[Picture]) -> list[list[Answer]]:
        """Return for each picture its answers."""
        found: list[list[Answer]] = []
        with bar(len(pictures), f"{self._config.policy} at {self._rate:g}", "picture") as shown:
            for picture in pictures:
                segments = segments_of(
                    self._oracle.reduce([picture.image], self._config, self._rate)
                )
                texts = [
                    self._oracle.answer(
                        prompt_of(question.text), segments, MAX_TOKENS, self._config.positions
                    )
                    for question in picture.questions
                ]
                found.append([Answer(cleaned(text), len(segments[0].anchors)) for text in texts])
                shown.update()
        return found


class ServerAsker:
    """Asks a server on this machine over the OpenAI API, past any proxy, for its only model."""

    def __init__(self, url: str) -> None:
        """Connect."""
        from openai import DefaultHttpxClient, OpenAI

        self._client = OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=_TIMEOUT_S,
            http_client=DefaultHttpxClient(trust_env=False),
        )
        self._model = self._client.models.list().data[0].id

    def ask(self, pictures: Sequence[Picture]) -> list[list[Answer]]:
        """Return for each picture its answers, some pictures at a time.

        Image tokens are what the server charges for the picture: its first question with it, less
        the same without.
        """
        total = sum(len(picture.questions) for picture in pictures)
        with (
            bar(total, "asking", "question") as shown,
            ThreadPoolExecutor(_PICTURES_AT_ONCE) as pool,
        ):
            found: list[list[Answer]] = []
            for answers in pool.map(self._about, pictures):
                found.append(answers)
                shown.update(len(answers))
        return found

    def _about(self, picture: Picture) -> list[Answer]:
        buffer = io.BytesIO()
        picture.image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        replies = [self._reply(question.text, url) for question in picture.questions]
        tokens = replies[0][1] - self._reply(picture.questions[0].text, None)[1]
        return [Answer(cleaned(text), tokens) for text, _ in replies]

    def _reply(self, question: str, picture: str | None) -> tuple[str, int]:
        """Return the text, and the tokens of the prompt."""
        parts: list[dict[str, object]] = [{"type": "text", "text": question}]
        if picture is not None:
            parts.insert(0, {"type": "image_url", "image_url": {"url": picture}})
        reply = self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": parts}],  # type: ignore[misc, list-item]
            max_tokens=MAX_TOKENS,
            temperature=0,
        )
        assert reply.usage is not None
        return reply.choices[0].message.content or "", reply.usage.prompt_tokens
