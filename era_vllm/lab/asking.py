"""Put questions about pictures to a model: one protocol, answered by transformers or a server.

An asker answers at one pruning rate. Leaves out the engine in this process (``bench/engines.py``
has its asker), pictures (``samples.py``, ``synth/``) and how often answers are right
(``accuracy.py``, ``scores.py``).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any, Final, Protocol, Self

from era_vllm.config import EraConfig
from era_vllm.errors import UnsupportedError
from era_vllm.lab.media import Medium, of_task, png
from era_vllm.lab.oracle import Oracle, segments_of
from era_vllm.lab.samples import Sample, TaskSample
from era_vllm.lab.screen import bar
from era_vllm.lab.synth.dataset import Example
from era_vllm.lab.synth.questions import Question
from era_vllm.lab.synth.tasks import Task

MAX_TOKENS: Final = 8
"""Of an answer; the longest right one has three words, then the end."""
_TIMEOUT_S: Final = 120.0
_SUBJECTS_AT_ONCE: Final = 4
Picture = Example | Sample
"""What is asked about: a picture with its questions, at least one."""
Subject = Picture | Task | TaskSample
"""The same, or pictures or a video with questions about all of it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says to one question: in lower case, words joined with blanks ("7 0")."""

    text: str
    image_tokens: int
    """Of the pictures and the video, after pruning."""

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


def chat_prompt(tokenizer: Any, question: str) -> str:  # noqa: ANN401  # Hugging Face's
    """Return a question about one picture in the form of a model's chat template."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


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


def media_of(subject: Subject) -> tuple[Medium, ...]:
    """Return the files that a question is about, in the order in which they are sent."""
    if isinstance(subject, TaskSample):
        return subject.media
    if isinstance(subject, Task):
        return of_task(subject)
    return (png(subject.image),)


class ServerAsker:
    """Asks a server of ours on this machine, past any proxy, for its only model.

    A context manager, which closes its connections.
    """

    def __init__(self, url: str, rate: float | None = None) -> None:
        """Connect.

        Args:    rate: of each request; None: the server's.
        Raises:  UnsupportedError: it does not tell its model.
        """
        from openai import DefaultHttpxClient, OpenAI, OpenAIError

        self._client = OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=2,  # a server with too much to do says when to come again
            timeout=_TIMEOUT_S,
            http_client=DefaultHttpxClient(trust_env=False),
        )
        self._url, self._failed = url, OpenAIError
        try:
            self._model = self._client.models.list().data[0].id
        except (OpenAIError, IndexError) as error:
            self._client.close()
            raise self._refusal(error) from error
        self._extra = {} if rate is None else {"era": {"pruning_rate": rate}}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, subjects: Sequence[Subject]) -> list[list[Answer]]:
        """Return for each subject its answers, with a progress bar."""
        total = sum(len(subject.questions) for subject in subjects)
        with bar(total, "asking", "question") as shown:
            found: list[list[Answer]] = []
            for answers in self.each(subjects):
                found.append(answers)
                shown.update(len(answers))
        return found

    def each(self, subjects: Sequence[Subject]) -> Iterator[list[Answer]]:
        """Yield the answers to each subject in turn; some are under way at once.

        Raises:
            UnsupportedError: a request was not answered; none is begun after it.
        """
        over = Event()
        with ThreadPoolExecutor(_SUBJECTS_AT_ONCE) as pool:
            try:
                yield from pool.map(partial(self._about, over=over), subjects)
            finally:
                over.set()

    def _about(self, subject: Subject, over: Event) -> list[Answer]:
        parts = [medium.part() for medium in media_of(subject)]
        found: list[Answer] = []
        for question in subject.questions:
            if over.is_set():
                break
            found.append(self._answer(question.text, parts))
        return found

    def _answer(self, question: str, parts: list[dict[str, object]]) -> Answer:
        content = [*parts, {"type": "text", "text": question}]
        try:
            reply = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": content}],  # type: ignore[misc, list-item]
                max_tokens=MAX_TOKENS,
                temperature=0,
                extra_body=self._extra,
            )
        except self._failed as error:
            raise self._refusal(error) from error
        pruned = getattr(reply, "era", None)
        if pruned is None:
            raise UnsupportedError(
                f"{self._url} answers without `era`: got a server that does not prune, needed "
                "one of era-vllm serve"
            )
        items = [*pruned.get("images", ()), *pruned.get("videos", ())]
        tokens = sum(item["tokens_after"] for item in items)
        return Answer(cleaned(reply.choices[0].message.content or ""), tokens)

    def _refusal(self, error: Exception) -> UnsupportedError:
        said = str(error)[:500] or type(error).__name__
        return UnsupportedError(f"{self._url} did not answer ({type(error).__name__}): {said}")
