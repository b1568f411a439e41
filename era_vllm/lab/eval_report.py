"""The page of an evaluation: figures as JSON, tables as Markdown, accuracy over tokens as PNG.

Leaves out how figures are worked out (``scores.py``).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from era_vllm.lab.asking import Subject
from era_vllm.lab.evaluation import Row
from era_vllm.lab.mass import Mass
from era_vllm.lab.scores import (
    RESAMPLES,
    Counts,
    Estimate,
    accuracy,
    agreement,
    by_family,
    count,
    difference,
    divergence,
)
from era_vllm.lab.synth.questions import TaskFamily
from era_vllm.lab.synth.tasks import YES_NO

_HEAD: Final = (
    "policy and options", "rate", "tokens", "s", "right", "against rate 0", "yes/no",
    "same as rate 0", "KL",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scored:
    """A row with what it is worth."""

    variant: str
    rate: float
    tokens: float
    """Visual tokens of a subject, the mean."""
    seconds: float
    """Of a question, the mean."""
    counts: Counts
    families: Mapping[TaskFamily, Estimate]
    right: Estimate | None
    """Mean over families without yes/no; None where none of them was asked."""
    against: Estimate | None
    """Its difference from the unpruned row, paired; None where there is no such row."""
    yes_no: Estimate | None
    same: Estimate | None
    """Answers that are those of the unpruned row."""
    kl: Estimate | None
    """Of their first tokens from the unpruned row's (``scores.kl``)."""

    def as_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return {**asdict(self), "counts": self.counts.by_family}


def scored(subjects: Sequence[Subject], rows: Sequence[Row]) -> list[Scored]:
    """Score the rows; the one at rate 0, if there is one, is what the others stand against."""
    counted = [count(subjects, row.answers) for row in rows]
    base = next((index for index, row in enumerate(rows) if row.rate == 0), None)
    found: list[Scored] = []
    for index, (row, counts) in enumerate(zip(rows, counted, strict=True)):
        compared = base is not None and index != base
        seconds = [answer.seconds for given in row.answers for answer in given]
        pair = (counts.kinds, row.answers, rows[base].answers) if compared else None
        found.append(
            Scored(
                row.variant,
                row.rate,
                row.tokens,
                sum(seconds) / len(seconds),
                counts,
                by_family(counts),
                accuracy(counts),
                difference(counts, counted[base]) if compared else None,
                accuracy(counts, yes_no=True),
                agreement(*pair) if pair else None,
                divergence(*pair) if pair else None,
            )
        )
    return found


def markdown(report: Mapping[str, Any], rows: Sequence[Scored], masses: Sequence[Mass] = ()) -> str:
    """Return the page.

    Args:
        report: Its head: model, tasks, split, seed, command, commit, versions, hardware.
        rows: Scored.
        masses: Attention on visual tokens, where it was measured.
    """
    asked_of = Counter(rows[0].counts.kinds)
    tasks = ", ".join(f"{number} {kind}" for kind, number in asked_of.items())
    asked = sum(number for _, number in rows[0].counts.by_family.values())
    origin = f"commit {report['commit']}, {report['hardware']}, {report['date']}"
    lines = [
        f"# Accuracy under pruning: {report['model']}",
        "",
        f"Tasks: {tasks}, {report['split']} split, seed {report['seed']}, {asked} questions;",
        "exact match.",
        f"`{report['command']}`, asker {report['asker']}, {origin}.",
        "",
        "*Right*: mean over families of questions, each counting the same, without yes/no",
        "questions, which chance answers half of. *Against rate 0*: difference in points over the",
        f"same tasks. Intervals: 95 %, {RESAMPLES} resamples of tasks. *Tokens*: visual ones of a",
        "task, the mean. *s*: seconds a question, beside others that are under way. *KL*: of first",
        "tokens from rate 0's, nats. Rate 0: the same, nothing pruned. Fewer than some 30 tasks say"
        " little.",
        "",
        *_table(_HEAD, [_cells(row) for row in rows]),
        "",
        "## By family",
        "",
        "In percent.",
        "",
    ]  # fmt: skip
    families = rows[0].counts.families
    head = ["policy and options", "rate", *(f"{n} (y/n)" if n in YES_NO else n for n in families)]
    body = [
        [row.variant, f"{row.rate:g}", *(found.text(".0f") for found in row.families.values())]
        for row in rows
    ]
    asked_row = ["questions", "", *(str(of) for _, of in rows[0].counts.by_family.values())]
    lines += [*_table(head, [*body, asked_row]), ""]
    return "\n".join([*lines, *_masses(report, masses)])


def _masses(report: Mapping[str, Any], masses: Sequence[Mass]) -> list[str]:
    if not masses:
        return []
    head = ["policy and options", "rate", *map(str, range(len(masses[0].layers)))]
    body = [
        [row.variant, f"{row.rate:g}", *(f"{100 * share:.1f}" for share in row.layers)]
        for row in masses
    ]
    return [
        "## Attention on visual tokens, by layer",
        "",
        "In percent, of the row that gives the first word of an answer, the mean over heads and",
        f"the questions of the first {report['mass']} tasks; plain transformers, float32.",
        "",
        *_table(head, body),
        "",
    ]


def _cells(row: Scored) -> list[str]:
    return [
        row.variant,
        f"{row.rate:g}",
        f"{row.tokens:.1f}",
        f"{row.seconds:.3f}",
        _text(row.right),
        _text(row.against, "+.1f"),
        _text(row.yes_no),
        _text(row.same),
        _text(row.kl, ".3f", 1),
    ]


def _text(found: Estimate | None, form: str = ".1f", unit: float = 100.0) -> str:
    return "-" if found is None else found.text(form, unit)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def draw(path: Path, title: str, rows: Sequence[Scored]) -> None:
    """Draw right answers over visual tokens, a line a variant, intervals as bars."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figure = Figure((8, 5), layout="constrained")
    axis = figure.subplots()
    for variant in dict.fromkeys(row.variant for row in rows if row.rate):
        points = [(row.tokens, row.right) for row in rows if row.variant == variant and row.right]
        xs = [tokens for tokens, _ in points]
        ys = [100 * found.value for _, found in points]
        spans = [
            [100 * (found.value - found.low) for _, found in points],
            [100 * (found.high - found.value) for _, found in points],
        ]
        axis.errorbar(xs, ys, spans, marker="o", ms=4, lw=1, elinewidth=0.6, label=variant)
    for row in rows:
        if not row.rate and row.right:
            text = f"unpruned, {row.tokens:.0f} tokens"
            axis.axhline(100 * row.right.value, color="black", ls="--", lw=0.8, label=text)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(sorted({round(row.tokens) for row in rows})))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("visual tokens of a task (mean)")
    axis.set_ylabel("right, % (mean over families without yes/no)")
    axis.set_ylim(0, 101)
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)
