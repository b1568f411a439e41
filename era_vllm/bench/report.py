"""What a benchmark hands back: its figures as JSON, a table, and goals judged plainly."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, Self

from era_vllm.bench.clock import Samples
from era_vllm.bench.provenance import command, provenance

SCHEMA: Final = 1
"""Raised when a key of the JSON changes its meaning."""
TOWER_SHARE: Final = 0.05
"""Of the vision tower's time that the pruning step may take."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure that was asked for."""

    name: str
    value: float | None
    """None = this run did not measure it."""
    sense: Literal["at least", "at most"]
    limit: float
    unit: str = "x"

    @classmethod
    def of_tower(cls, name: str, share: float | None) -> Self:
        """Return that of the pruning step: its share of the vision tower's time."""
        return cls(name, share and 100 * share, "at most", 100 * TOWER_SHARE, " %")

    @property
    def met(self) -> bool | None:
        """Whether the figure is reached; None if it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.sense == "at least" else self.value <= self.limit

    def line(self) -> str:
        """Return the verdict as a line."""
        word = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        got = "" if self.value is None else f"{self.value:.3g}{self.unit}, "
        return f"{word:<13} {self.name}: {got}{self.sense} {self.limit:g}{self.unit}"

    def as_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True, slots=True)
class Report:
    """One benchmark's outcome."""

    samples: Samples
    tables: Sequence[str]
    """For the screen."""
    goals: Sequence[Goal]
    facts: Mapping[str, object]
    """What is no time: sizes, KV blocks, fits, the profile."""
    notes: Sequence[str] = field(default=())
    """What a reader has to know beside the figures."""

    def as_dict(self, bench: str, settings: Mapping[str, object]) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "bench": bench,
            "schema": SCHEMA,
            **provenance(),
            "command": command(),
            "settings": dict(settings),
            "goals": [goal.as_dict() for goal in self.goals],
            "facts": dict(self.facts),
            "notes": list(self.notes),
            "samples": self.samples.summary(),
        }

    def text(self) -> str:
        """Return tables, goals and notes as a page."""
        parts = ["", *(table + "\n" for table in self.tables)]
        if self.goals:
            parts += ["goals", *(f"  {goal.line()}" for goal in self.goals), ""]
        return "\n".join([*parts, *(f"note: {note}" for note in self.notes)])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns: the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def shown(seconds: float | None) -> str:
    """Return a time with a unit that keeps it readable; a dash for none."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def percent(share: float | None) -> str:
    """Return a share; a dash for none."""
    return "-" if share is None else f"{share:.1%}"


def times(ratio: float | None) -> str:
    """Return a factor; a dash for none."""
    return "-" if ratio is None else f"{ratio:.3f}x"


def engine_table(engines: Mapping[str, Mapping[str, Any]], base: str = "") -> str:
    """Return heads and KV cache as a table.

    Args:
        engines: The facts by name.
        base: The one that the tokens held are compared with in a last column; none by default.
    """
    keys = ("head_size", "attention_backend", "kv_blocks", "kv_block_tokens", "kv_tokens")
    if any(fact.get("injection_mib") for fact in engines.values()):
        keys = (*keys, "injection_mib")
    header = ["engine", *(key.replace("_", " ") for key in keys)]
    rows = [[name, *(str(fact[key]) for key in keys)] for name, fact in engines.items()]
    if base:
        held = {name: fact["kv_tokens"] for name, fact in engines.items()}
        header.append(f"of {base}")
        rows = [[*row, times(held[row[0]] / held[base])] for row in rows]
    return table(header, rows)
