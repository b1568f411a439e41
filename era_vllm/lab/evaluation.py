"""Ask servers of ours everything: variants (policy and options) x rates, and keep each answer.

A variant is a server, a rate a field of its requests. Answers are written as they come, so that an
evaluation that was stopped goes on where it was. Rate 0 is stock vLLM whatever the variant, and
asked once. Leaves out what the answers are worth (``scores.py``) and the page
(``eval_report.py``).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from era_vllm.errors import ConfigError
from era_vllm.lab.asking import Answer, ServerAsker, Subject

ANSWERS: Final = "answers.jsonl"


@dataclass(frozen=True, slots=True)
class Variant:
    """What a server is started with."""

    policy: str
    options: tuple[tuple[str, object], ...] = ()
    """Fields of ``EraConfig`` beside it."""

    @property
    def name(self) -> str:
        """Return ``era``, ``era bias=false``."""
        said = (f"{name}={json.dumps(value)}" for name, value in self.options)
        return " ".join([self.policy, *said])

    def variables(self) -> dict[str, str]:
        """Return the environment that ``era-vllm serve`` reads it from."""
        fields = {"policy": self.policy, **dict(self.options)}
        return {
            f"ERA_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
            for name, value in fields.items()
        }


@dataclass(frozen=True, slots=True)
class Row:
    """All answers of a variant at a rate: a list for each subject."""

    variant: str
    rate: float
    answers: list[list[Answer]]


class Answers:
    """The file of answers: a head that says what was asked, then a line for each subject."""

    def __init__(self, folder: Path, head: Mapping[str, object]) -> None:
        """Open it, or begin it.

        Raises:
            ConfigError: it is there and has another head.
        """
        self._path = folder / ANSWERS
        self._known: dict[tuple[str, float], list[list[Answer]]] = {}
        head = json.loads(json.dumps(head))
        if not self._path.exists():
            self._path.write_text(json.dumps(head) + "\n", encoding="utf-8")
            return
        first, *lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        found = json.loads(first)
        if found != head:
            names = [name for name in head if found.get(name) != head[name]]
            raise ConfigError(
                f"--out: {str(self._path)!r} holds answers to another evaluation (differs in "
                f"{', '.join(names)}); name another folder, or remove that file"
            )
        whole = [line for line in lines if line.endswith("\n")]  # the last may be cut off
        if len(whole) < len(lines):
            self._path.write_text("".join([first, *whole]), encoding="utf-8")
        for line in map(json.loads, whole):
            given = [Answer(text, line["tokens"]) for text in line["texts"]]
            self._known.setdefault((line["variant"], line["rate"]), []).append(given)

    def of(self, variant: str, rate: float) -> list[list[Answer]]:
        """Return the answers so far, in the order of the subjects."""
        return self._known.setdefault((variant, rate), [])

    def add(self, variant: str, rate: float, given: list[Answer]) -> None:
        """Keep the answers to the next subject."""
        self.of(variant, rate).append(given)
        line: dict[str, Any] = {"variant": variant, "rate": rate}
        line |= {"tokens": given[0].image_tokens, "texts": [answer.text for answer in given]}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def cells(variants: Sequence[Variant], rates: Sequence[float]) -> list[tuple[Variant, float]]:
    """Return what is asked, variant after variant; rate 0, which is stock vLLM, once and first."""
    pruned = [rate for rate in rates if rate > 0]
    first = [(variants[0], 0.0)] if len(pruned) < len(rates) else []
    return first + [(variant, rate) for variant in variants for rate in pruned]


def evaluate(
    subjects: Sequence[Subject],
    wanted: Sequence[tuple[Variant, float]],
    answers: Answers,
    served: "Any",
    shown: "tqdm[Any]",
) -> Iterator[Row]:
    """Ask what has no answer yet, and yield the rows as they are whole.

    Args:
        wanted: Of ``cells``.
        answers: The file.
        served: ``served(variant)`` is a context that yields a server's URL.
        shown: Progress over cells x subjects.
    """
    for variant in dict.fromkeys(variant for variant, _ in wanted):
        rates = [rate for one, rate in wanted if one == variant]
        open_rates = [r for r in rates if len(answers.of(variant.name, r)) < len(subjects)]
        shown.update(sum(len(answers.of(variant.name, rate)) for rate in rates))
        if open_rates:
            with served(variant) as url:
                for rate in open_rates:
                    shown.set_postfix_str(f"{variant.name} at {rate:g}")
                    left = subjects[len(answers.of(variant.name, rate)) :]
                    for given in ServerAsker(url, rate).each(left):
                        answers.add(variant.name, rate, given)
                        shown.update()
        for rate in rates:
            yield Row(variant.name, rate, answers.of(variant.name, rate))


@contextmanager
def at(url: str) -> Iterator[str]:
    """Stand for a server that is up already."""
    yield url
