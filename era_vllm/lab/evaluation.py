"""Ask a model everything: variants (policy and options) x rates, and keep each answer.

A variant is an asker of its own (a server, an engine), a rate what it is asked with. Answers are
written as they come, so that an evaluation that was stopped goes on where it was. Rate 0 is
the first variant's with nothing pruned, and asked once. Leaves out who answers
(``cli/askers.py``), what the answers are worth (``scores.py``) and the pages (``eval_report.py``,
``recommend_report.py``).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any, Final, Self

from tqdm import tqdm

from era_vllm.errors import ConfigError
from era_vllm.lab.asking import Answer, Asker, Subject

ANSWERS: Final = "answers.jsonl"
FORMAT: Final = 2
"""Of that file: since 2 each answer's seconds and first token are in it."""


@dataclass(frozen=True, slots=True)
class Variant:
    """How a model prunes."""

    policy: str
    options: tuple[tuple[str, object], ...] = ()
    """Fields of ``EraConfig`` beside it."""

    def __hash__(self) -> int:
        """By its name: a value may be a table."""
        return hash(self.name)

    @property
    def name(self) -> str:
        """Return ``era``, ``era bias=false``."""
        options = (f"{name}={setting(value)}" for name, value in self.options)
        return " ".join([self.policy, *options])

    def row(self, rate: float) -> str:
        """Return the name of its row at a rate; at 0 nothing is pruned, whatever it is."""
        return self.name if rate else "unpruned"

    @property
    def settings(self) -> dict[str, object]:
        """Return fields of ``EraConfig``."""
        return {"policy": self.policy, **dict(self.options)}


@dataclass(frozen=True, slots=True)
class Row:
    """All answers of a variant at a rate: a list for each subject."""

    variant: str
    rate: float
    answers: list[list[Answer]]

    @property
    def tokens(self) -> float:
        """Return the visual tokens of a subject, the mean."""
        return sum(given[0].image_tokens for given in self.answers) / len(self.answers)


class Answers:
    """The file of answers: a head that says what was asked, then a line for each subject.

    A context manager; one process at a time has it.
    """

    def __init__(self, folder: Path, head: Mapping[str, object]) -> None:
        """Open it, or begin it.

        Raises:
            ConfigError: it has another head, another process has it, or it is no such file.
        """
        self._path = folder / ANSWERS
        self._known: dict[tuple[str, float], list[list[Answer]]] = {}
        try:
            self._file = self._path.open("a+", encoding="utf-8", newline="")
        except OSError as error:
            raise ConfigError(
                f"--out: {str(self._path)!r}: {error.strerror}; name another folder"
            ) from error
        try:
            self._begin(json.loads(json.dumps({"format": FORMAT, **head})))
        except BaseException:
            self._file.close()
            raise

    def _begin(self, head: Mapping[str, object]) -> None:
        try:
            flock(self._file, LOCK_EX | LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"--out: another evaluation is writing to {str(self._path)!r}; wait for it, or "
                "name another folder"
            ) from error
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # the last line may be cut off
        if not content or (not whole and content.startswith(b'{"format": ')):  # the head was
            self._file.truncate(0)
            self._write(head)
            return
        try:
            self._read((whole or content).decode().splitlines(), head)
            self._file.truncate(len(whole))  # it is ours
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--out: {str(self._path)!r} is no file of answers; name another folder, or remove "
                "that file"
            ) from error

    def _read(self, lines: Sequence[str], head: Mapping[str, object]) -> None:
        found, *rows = map(json.loads, lines)
        if "model" in found and found.get("format") != FORMAT:
            raise ConfigError(
                f"--out: {str(self._path)!r} has format {found.get('format', 1)}, needed {FORMAT}: "
                "another version of era-vllm wrote it; name another folder, or remove that file"
            )
        names = [name for name in {**head, **found} if found.get(name) != head.get(name)]
        if names:
            raise ConfigError(
                f"--out: {str(self._path)!r} holds answers to another evaluation (differs in "
                f"{', '.join(names)}); name another folder, or remove that file"
            )
        for row in rows:
            known = self.of(row["variant"], row["rate"])
            if row["subject"] != len(known):
                raise ValueError(f"subject {row['subject']} where {len(known)} was to come")
            rest = zip(row["texts"], row["seconds"], row["first"], strict=True)
            known.append([_answer(int(row["tokens"]), *one) for one in rest])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def of(self, variant: str, rate: float) -> list[list[Answer]]:
        """Return the answers so far, in the order of the subjects."""
        return self._known.setdefault((variant, rate), [])

    def add(self, variant: str, rate: float, given: list[Answer]) -> None:
        """Keep the answers to the next subject."""
        known = self.of(variant, rate)
        line: dict[str, Any] = {"variant": variant, "rate": rate, "subject": len(known)}
        line["tokens"] = given[0].image_tokens if given else 0
        line["texts"] = [answer.text for answer in given]
        line["seconds"] = [round(answer.seconds, 4) for answer in given]
        line["first"] = [_rounded(answer.first) for answer in given]
        known.append(given)
        self._write(line)

    def _write(self, line: Mapping[str, object]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def setting(value: object) -> str:
    """Return a field's value as a flag or a variable spells it."""
    return value if isinstance(value, str) else json.dumps(value)


def _rounded(first: Mapping[int, float] | None) -> dict[int, float] | None:
    return first and {token: round(value, 5) for token, value in first.items()}


def _answer(tokens: int, text: str, seconds: float, first: dict[str, float] | None) -> Answer:
    return Answer(text, tokens, seconds, first and {int(key): first[key] for key in first})


def cells(variants: Sequence[Variant], rates: Sequence[float]) -> list[tuple[Variant, float]]:
    """Return what is asked, variant after variant; rate 0, which is stock vLLM, once and first."""
    pruned = [rate for rate in rates if rate > 0]
    first = [(variants[0], 0.0)] if len(pruned) < len(rates) else []
    return first + [(variant, rate) for variant in variants for rate in pruned]


def evaluate(
    subjects: Sequence[Subject],
    wanted: Sequence[tuple[Variant, float]],
    answers: Answers,
    asker_of: Callable[[Variant], AbstractContextManager[Asker]],
    shown: "tqdm[Any]",
) -> Iterator[Row]:
    """Ask what has no answer yet, and yield the rows as they are whole.

    Args:
        wanted: Of ``cells``.
        answers: The file.
        asker_of: ``asker_of(variant)`` is a context that yields what answers.
        shown: Progress over cells x subjects.
    """
    for variant in dict.fromkeys(variant for variant, _ in wanted):
        rates = {rate: variant.row(rate) for one, rate in wanted if one == variant}
        known = {rate: answers.of(name, rate) for rate, name in rates.items()}
        shown.update(sum(map(len, known.values())))
        left = [rate for rate in rates if len(known[rate]) < len(subjects)]
        if left:
            with asker_of(variant) as asker:
                for rate in left:
                    shown.set_postfix_str(f"{variant.name} at {rate:g}")
                    for given in asker.each(subjects[len(known[rate]) :], rate):
                        answers.add(rates[rate], rate, given)
                        shown.update()
        for rate, name in rates.items():
            yield Row(name, rate, known[rate])
