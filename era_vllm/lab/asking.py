"""Put questions about pictures to a model: one protocol, whoever answers.

An asker is a model that answers at any pruning rate: a server or plain transformers here, an engine
in this process in ``bench/engines.py``. All read the same files and the same chat template. Leaves
out pictures (``samples.py``, ``synth/``) and what answers are worth (``scores.py``).
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from PIL import Image
from tqdm import tqdm

from era_vllm.config import EraConfig
from era_vllm.errors import UnsupportedError
from era_vllm.lab.media import Medium
from era_vllm.lab.screen import bar
from era_vllm.question import of_text, special_ids

if TYPE_CHECKING:
    from torch import Tensor

    from era_vllm.lab.oracle import Oracle, Segment
    from era_vllm.lab.synth.questions import Question

MAX_TOKENS: Final = 8
"""Of an answer; the longest right one of a generated question has three words, then the end."""
SHOWN: Final = 20
"""First tokens whose log-probabilities vLLM tells of at most, where nothing else is set."""
LEAST: Final = 1e-6
"""Probability below which plain transformers tells of no first token."""
_TIMEOUT_S: Final = 600.0
_SUBJECTS_AT_ONCE: Final = 4
_OF_THE_SUBJECT: Final = (400, 413, 415, 422)
"""Statuses of a server that will not take a picture, where it may take the next."""


class Subject(Protocol):
    """A picture, several, or a video, with questions about all of it: at least one."""

    @property
    def questions(self) -> "tuple[Question, ...]":
        """What is asked; askers read its ``text``."""
        ...

    @property
    def media(self) -> tuple[Medium, ...]:
        """Files in the order in which they are sent."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says to one question: in lower case, words joined with blanks ("7 0")."""

    text: str
    image_tokens: int
    """Of the pictures and the video, after pruning."""
    seconds: float = field(default=0.0, compare=False)
    """A server's request, beside up to three others; of an engine's batch, or of what plain
    transformers took for a subject, a question's share."""
    first: Mapping[int, float] | None = field(default=None, compare=False)
    """Token id -> log-probability of the first token, the likeliest; None: not asked for."""

    def is_right(self, question: "Question") -> bool:
        """Whether it is exactly right."""
        return self.text == question.answer


class Asker(Protocol):
    """A model; decodes greedily."""

    def each(self, subjects: Sequence[Subject], rate: float | None) -> Iterator[list[Answer]]:
        """Yield the answers to each subject in turn, in the order of its questions.

        Args:    rate: of pruning; None: the model's own.
        Raises:  UnsupportedError: it cannot answer; nothing further is asked.
        """
        ...


def ask(asker: Asker, subjects: Sequence[Subject], rate: float | None = None) -> list[list[Answer]]:
    """Return the answers to all subjects, with a progress bar."""
    total = sum(len(subject.questions) for subject in subjects)
    with bar(total, "asking", "question") as shown:
        found: list[list[Answer]] = []
        for answers in asker.each(subjects, rate):
            found.append(answers)
            shown.update(len(answers))
    return found


def prompt_of(question: str) -> str:
    """Return LLaVA's prompt about one picture."""
    return f"USER: <image>\n{question} ASSISTANT:"


def chat_prompt(tokenizer: Any, question: str, pictures: int = 1) -> str:  # noqa: ANN401
    """Return a question about pictures in the form of a model's chat template."""
    content = [*[{"type": "image"}] * pictures, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def chat_ids(oracle: "Oracle", question: str, segments: "Sequence[Segment]") -> list[int]:
    """Return the token ids of a question about pictures, each as long as what stands for it."""
    text = chat_prompt(oracle.processor, question, len(segments))
    kept = [len(segment.anchors) for segment in segments]
    return oracle.prompt_ids(text, kept, add_special_tokens=False)


def messages_of(subject: Subject) -> Iterator[list[dict[str, object]]]:
    """Yield the messages of each question, files before text."""
    parts = [medium.part() for medium in subject.media]
    for question in subject.questions:
        yield [{"role": "user", "content": [*parts, {"type": "text", "text": question.text}]}]


def cleaned(text: str) -> str:
    """Return an answer as it is compared."""
    return text.strip().lower()


class TransformersAsker:
    """Asks plain transformers: the reference that the engine is held against. Imports no vLLM.

    About pictures: the oracle carries no tower that reads videos.
    """

    def __init__(self, oracle: "Oracle", config: EraConfig, max_tokens: int = MAX_TOKENS) -> None:
        self._oracle, self._config, self._max_tokens = oracle, config, max_tokens

    def each(
        self, subjects: Sequence[Subject], rate: float | None = None
    ) -> Iterator[list[Answer]]:
        rate = self._config.pruning_rate if rate is None else rate
        for subject in subjects:
            yield self._about(subject, rate)

    def _about(self, subject: Subject, rate: float) -> list[Answer]:
        started, said = time.perf_counter(), list[tuple[str, int, dict[int, float]]]()
        for ids, segments in self.prompts(subject, rate):
            text, first = self._oracle.decode(
                ids, segments, self._max_tokens, self._config.positions, self._config.gamma
            )
            kept = sum(len(segment.anchors) for segment in segments)
            said.append((cleaned(text), kept, _likely(first)))
        seconds = (time.perf_counter() - started) / len(subject.questions)
        return [Answer(text, kept, seconds, first) for text, kept, first in said]

    def prompts(self, subject: Subject, rate: float) -> "Iterator[tuple[list[int], list[Segment]]]":
        """Yield each question as token ids, and what stands for its pictures."""
        if any(medium.kind == "video" for medium in subject.media):
            raise UnsupportedError(
                "transformers: got a video, allowed: pictures, which alone it prunes by itself; "
                "ask an engine or a server"
            )
        images = [medium.picture() for medium in subject.media]
        segments: list[Segment] = []
        for question in subject.questions:
            if self._config.question_aware or not segments:
                segments = self.kept(question.text, images, rate)
            yield chat_ids(self._oracle, question.text, segments), segments

    def kept(self, text: str, images: Sequence[Image.Image], rate: float) -> "list[Segment]":
        """Return what stands for pictures, pruned for a question where questions count."""
        from era_vllm.lab.oracle import segments_of

        questions = None
        if self._config.question_aware:
            tokenizer = self._oracle.processor.tokenizer
            questions = [of_text(text, tokenizer, special_ids(tokenizer))] * len(images)
        return segments_of(self._oracle.reduce(images, self._config, rate, questions))


def _likely(row: "Tensor") -> dict[int, float]:
    floor = math.log(LEAST)
    return {token: value for token, value in enumerate(row.tolist()) if value > floor}


class ServerAsker:
    """Asks a server of ours, past any proxy, for its only model.

    A context manager, which closes its connections.
    """

    def __init__(
        self,
        url: str,
        max_tokens: int = MAX_TOKENS,
        *,
        shown: int = 0,
        key: str | None = None,
        passes_over: bool = False,
    ) -> None:
        """Connect.

        Args:
            url: Without ``/v1``.
            max_tokens: Of an answer.
            shown: First tokens whose log-probabilities are asked for.
            key: The server's; None where it has none.
            passes_over: A subject that the server will not take is named on standard error, and
                has no answers.

        Raises:
            UnsupportedError: it does not tell its model.
        """
        from openai import DefaultHttpxClient, OpenAI, OpenAIError

        self._client = OpenAI(
            base_url=f"{url}/v1",
            api_key=key or "none",
            max_retries=2,  # a server with too much to do says when to come again
            timeout=_TIMEOUT_S,
            http_client=DefaultHttpxClient(trust_env=False),
        )
        self._url, self._failed, self._max_tokens = url, OpenAIError, max_tokens
        self._passes_over, self._left_out = passes_over, set[str]()
        try:
            self._model = self._client.models.list().data[0].id
        except (OpenAIError, IndexError) as error:
            self._client.close()
            raise self._refusal(error) from error
        self._extra: dict[str, Any] = {"logprobs": True, "top_logprobs": shown} if shown else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def each(
        self, subjects: Sequence[Subject], rate: float | None = None
    ) -> Iterator[list[Answer]]:
        """Yield the answers to each subject in turn; some are under way at once.

        Raises:
            UnsupportedError: a request was not answered; none is begun after it.
        """
        over = Event()
        with ThreadPoolExecutor(_SUBJECTS_AT_ONCE) as pool:
            try:
                yield from pool.map(partial(self._about, rate=rate, over=over), subjects)
            finally:
                over.set()

    def _about(self, subject: Subject, rate: float | None, over: Event) -> list[Answer]:
        found: list[Answer] = []
        for messages in messages_of(subject):
            if over.is_set():
                break
            try:
                found.append(self._answer(messages, rate))
            except self._failed as error:
                status = getattr(error, "status_code", None)
                if not self._passes_over or status not in _OF_THE_SUBJECT:
                    raise self._refusal(error) from error
                if (name := getattr(subject, "name", "a subject")) not in self._left_out:
                    self._left_out.add(name)
                    tqdm.write(f"left out: {name}: {self._refusal(error)}", sys.stderr)
                return []
        return found

    def _answer(self, messages: list[dict[str, object]], rate: float | None) -> Answer:
        extra: dict[str, object] = {} if rate is None else {"era": {"pruning_rate": rate}}
        extra |= {"return_tokens_as_token_ids": True} if self._extra else {}
        started = time.perf_counter()
        reply = self._client.chat.completions.create(
            model=self._model,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=self._max_tokens,
            temperature=0,
            extra_body=extra,
            **self._extra,
        )
        seconds = time.perf_counter() - started
        pruned = getattr(reply, "era", None)
        if pruned is None:
            raise UnsupportedError(
                f"{self._url} answers without `era`: got a server that does not prune, needed "
                "one of era-vllm serve"
            )
        items = [*pruned.get("images", ()), *pruned.get("videos", ())]
        tokens, choice = sum(item["tokens_after"] for item in items), reply.choices[0]
        told = choice.logprobs.content if choice.logprobs else None
        first = told and {
            int(one.token.partition(":")[2]): one.logprob for one in told[0].top_logprobs
        }
        return Answer(cleaned(choice.message.content or ""), tokens, seconds, first or None)

    def drawn(self, picture: Medium, rate: float) -> bytes:
        """Return a PNG of what is kept of a picture.

        Raises:
            UnsupportedError: the server does not draw it.
        """
        import httpx

        body = {**picture.part(), "era": {"pruning_rate": rate}}
        accept: Any = {"headers": {"Accept": "image/png"}}
        try:
            reply = self._client.post(
                "/era/inspect", cast_to=httpx.Response, body=body, options=accept
            )
        except self._failed as error:
            raise self._refusal(error) from error
        return reply.content

    def _refusal(self, error: Exception) -> UnsupportedError:
        said = str(error)[:500] or type(error).__name__
        return UnsupportedError(f"{self._url} did not answer ({type(error).__name__}): {said}")
