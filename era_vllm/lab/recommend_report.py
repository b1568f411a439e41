"""The page of a recommendation: one HTML file that needs no network, and the same as text.

Leaves out the figures (``recommendation.py``).
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from PIL import Image, ImageOps

from era_vllm.lab.recommendation import DRAWS, SHORT, Disagreement, Level
from era_vllm.lab.scores import RESAMPLES

_HEAD: Final = (
    "level", "rate", "tokens", "tokens saved", "time saved", "agreement", "same words", "word F1",
    "KL", "reaches target",
)  # fmt: skip
_PICTURE: Final = 360
"""Pixels of the longer side of a picture in the page."""
_DRAWING: Final = 900
"""The same of a drawing."""
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760, 330, 60, 20, 50  # of the plot
_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1060px; padding: 0 1rem;
  color: #1d2129; background: #fff }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.verdict { border-left: 5px solid #2e6fe4; background: #f2f6fd; padding: .8rem 1.1rem;
  margin: 1rem 0 }
.verdict.none { border-color: #d0502a; background: #fdf3ef } .verdict p { margin: .3rem 0 }
.verdict strong { font-size: 1.15rem }
code { background: #eef0f3; padding: .1rem .3rem; border-radius: 3px; font-size: .92em }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .35rem .5rem; border-bottom: 1px solid #dde1e6;
  white-space: nowrap }
th { font-weight: 600; color: #566; white-space: normal; vertical-align: bottom }
th:first-child, td:first-child { text-align: left } tr.best td { background: #e9f1fe }
td small { color: #667; display: block } .faint { color: #667; font-size: .9em }
.case { border: 1px solid #dde1e6; border-radius: 6px; padding: .8rem 1rem; margin: 1rem 0 }
.case h3 { margin: 0 0 .5rem; font-size: 1rem } .pictures { display: flex; gap: 1rem;
  align-items: flex-start } .pictures img:first-child { max-width: 260px }
.pictures img { max-width: 100%; max-height: 480px; min-width: 0; flex: 0 1 auto;
  object-fit: contain; border-radius: 4px }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: .7rem }
.answers div { background: #f6f7f9; border-radius: 4px; padding: .5rem .8rem;
  overflow-wrap: anywhere } .answers .pruned { background: #fdf3ef }
.answers b { display: block; font-size: .85em; color: #566; font-weight: 600 }
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A disagreement to show."""

    picture: str
    """Its name."""
    found: Disagreement
    given: bytes
    """The picture's file."""
    kept: bytes | str
    """A drawing of what was kept, or why there is none."""


def name_of(level: Level) -> str:
    """Return a level's name, or its rate; "off" of one that removes nothing."""
    return "off" if not level.rate else level.name or f"{level.rate:g}"


def verdict(
    best: Level | None, pruned: Sequence[Level], pictures: int, target: float, command: str
) -> list[str]:
    """Return what is recommended, how sure that is, and how it is set: a line each.

    Args:    command: what serves the model, without a rate; empty: a server that is up.
    """
    aim = f"the target of {100 * target:g} %"
    if best is None:
        mild = min(pruned, key=lambda level: level.rate)
        return [
            "recommended: no pruning (off)",
            f"{name_of(mild)} (rate {mild.rate:g}), the mildest, has an agreement of "
            f"{mild.agreement.text()} %: below {aim}",
            "try milder rates (--rates .2 .35), or a lower --target if these answers are still "
            "good: the disagreements below show what changes",
        ]
    level = f'{{"era": {{"level": "{best.name}"}}}}' if best.name else ""
    field = f'{{"era": {{"pruning_rate": {best.rate:g}}}}}'
    flag = f"--era-pruning-rate {best.rate:g}"
    flag += "" if command else " (beside the server's own flags)"
    needed = best.pictures_needed(pictures)
    enough = "these are enough" if needed <= pictures else f"about {needed} are needed"
    too_few = "" if best.sure >= 0.5 else " (these are too few pictures to trust it)"
    return [
        f"recommended: {name_of(best)} (rate {best.rate:g}), {100 * best.saved_tokens:.0f} % of "
        "the visual tokens less",
        f"agreement with the unpruned answers: {best.agreement.text()} %; {aim} is reached with a "
        f"probability of {100 * best.sure:.0f} %{too_few}",
        f"{pictures} pictures were asked about; for an interval of +-2 points {enough}",
        f"for every request: {' '.join(filter(None, [command, flag]))}",
        f"in a request: {field}{f' or {level}' if level else ''}",
    ]


def table(whole: Level, pruned: Sequence[Level]) -> list[list[str]]:
    """Return head and rows; an interval stands behind its value in brackets."""
    rows = [[*_HEAD]]
    for level in (whole, *pruned):
        first = [name_of(level), f"{level.rate:g}", f"{level.tokens:.0f}"]
        if level is whole:
            rows.append([*first, *["-"] * (len(_HEAD) - len(first))])
            continue
        rows.append(
            [
                *first,
                f"{100 * level.saved_tokens:.0f} %",
                f"{level.saved_seconds.text('.0f')} %",
                f"{level.agreement.text()} %",
                f"{level.same.text()} %",
                f"{level.f1.text()} %",
                "-" if level.kl is None else level.kl.text(".3f", 1),
                f"{100 * level.sure:.0f} %",
            ]
        )
    return rows


def text_of(rows: Sequence[Sequence[str]]) -> str:
    """Return a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def page(
    head: Mapping[str, Any],
    said: Sequence[str],
    whole: Level,
    pruned: Sequence[Level],
    best: Level | None,
    cases: Mapping[str, Sequence[Case]],
) -> str:
    """Return the page.

    Args:
        head: Model, pictures, prompts, target, command, commit, hardware, date.
        said: ``verdict``.
        whole, pruned, best: Levels.
        cases: Title -> what is shown under it.
    """
    first, *rest = said
    lines = "".join(f"<p>{_marked(line)}</p>" for line in rest)
    title = f"Pruning rate for {escape(head['model'])}"
    origin = ", ".join(str(head[key]) for key in ("hardware", "date") if head.get(key))
    none = "<p>None: every answer has the same words.</p>"
    shown = "".join(
        f"<h2>{escape(name)}</h2>{''.join(map(_case, some)) or none}"
        for name, some in cases.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p class="faint">{head["pictures"]} pictures, {head["questions"]} questions each on average;
<code>{escape(head["command"])}</code>; {escape(origin)}</p>
<div class="verdict{"" if best else " none"}"><p><strong>{escape(first)}</strong></p>{lines}</div>
<h2>Agreement over the visual tokens of a picture</h2>{_plot(whole, pruned, best, head["target"])}
<h2>Levels</h2>{_html(table(whole, pruned), [whole, *pruned], best)}
<p class="faint"><b>Agreement</b>: an unpruned answer of up to {SHORT} words is the same or is not,
of a longer one the F1 of the words counts. <b>KL</b>: of the first token of an answer from the
unpruned one, nats. <b>Time</b>: of a question, others under way beside it. Intervals: 95 %,
{RESAMPLES} resamples of the pictures, paired; of the agreement, {DRAWS} draws of a Bayesian
bootstrap with one more picture, whose agreement may be any. A different answer is not a worse one,
and the same is not a right one: look at the disagreements.</p>{shown}</body></html>
"""


def _marked(line: str) -> str:
    """Set what is to be typed apart."""
    name, sign, value = line.partition(": ")
    typed = sign and ("--era-" in value or value.startswith("{"))
    if not typed:
        return escape(line)
    parts = " or ".join(f"<code>{escape(part)}</code>" for part in value.split(" or "))
    return f"{escape(name)}: {parts}"


def _html(rows: Sequence[Sequence[str]], levels: Sequence[Level], best: Level | None) -> str:
    head, *body = rows
    found = ["<tr>", *(f"<th>{escape(cell)}</th>" for cell in head), "</tr>"]
    for row, level in zip(body, levels, strict=True):
        found.append('<tr class="best">' if level is best else "<tr>")
        for cell in row:
            value, bracket, interval = cell.partition(" (")
            unit = " %" if interval.endswith("%") else ""
            small = f"<small>{escape(interval.split(')')[0])}</small>" if bracket else ""
            found.append(f"<td>{escape(value)}{unit if bracket else ''}{small}</td>")
        found.append("</tr>")
    return f"<table>{''.join(found)}</table>"


def _plot(whole: Level, pruned: Sequence[Level], best: Level | None, target: float) -> str:
    """Draw agreement with intervals over tokens kept, a log scale."""
    levels = [whole, *pruned]
    low = min(target, *(level.agreement.low for level in levels))
    floor = max(0.0, math.floor(10 * low - 0.2) / 10)
    few, most = (f(level.tokens for level in levels) for f in (min, max))
    span = math.log(most / few) or 1.0
    inner = _WIDTH - _LEFT - 40

    def x(level: Level) -> float:
        return _LEFT + 20 + (inner - 20) * math.log(level.tokens / few) / span

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value) / (1 - floor)

    step = 0.05 if floor >= 0.75 else 0.1 if floor >= 0.4 else 0.2
    ticks = [1 - step * at for at in range(int((1 - floor) / step + 1.01))]
    ends = f'x1="{_LEFT}" x2="{_WIDTH - 20}"'
    parts = [
        f'<line {ends} y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e3e6ea"/>'
        f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:.0f} %</text>'
        for tick in ticks
    ]
    parts.append(
        f'<line {ends} y1="{y(target):.1f}" y2="{y(target):.1f}" stroke="#d0502a" '
        f'stroke-dasharray="5 4"/><text x="{_WIDTH - 22}" y="{y(target) + 14:.1f}" fill="#d0502a" '
        f'text-anchor="end">target {100 * target:g} %</text>'
    )
    points = " ".join(f"{x(level):.1f},{y(level.agreement.value):.1f}" for level in levels)
    parts.append(f'<polyline points="{points}" fill="none" stroke="#2e6fe4" stroke-width="1.5"/>')
    for level in levels:
        at, found = f"{x(level):.1f}", level.agreement
        bold = ' font-weight="700"' if level is best else ""
        bottom = _HEIGHT - _BOTTOM
        if level is not whole:
            parts.append(
                f'<line x1="{at}" x2="{at}" y1="{y(found.low):.1f}" y2="{y(found.high):.1f}" '
                'stroke="#2e6fe4" stroke-width="2"/>'
            )
        parts.append(
            f'<circle cx="{at}" cy="{y(found.value):.1f}" r="{6 if level is best else 4}" '
            f'fill="#2e6fe4"/><text x="{at}" y="{bottom + 18}" text-anchor="middle"{bold}>'
            f'{level.tokens:.0f}</text><text x="{at}" y="{bottom + 34}" text-anchor="middle"'
            f'{bold} fill="#667">{escape(name_of(level))}</text>'
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" style="max-width:100%" '
        f'font-size="12" font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )


def _case(case: Case) -> str:
    found = case.found
    drawing = (
        f"<p class='faint'>{escape(case.kept)}</p>"
        if isinstance(case.kept, str)
        else _img(case.kept, _DRAWING, "what is kept")
    )
    return f"""<div class="case"><h3>{escape(case.picture)}: {escape(found.question)}</h3>
<div class="pictures">{_img(case.given, _PICTURE, case.picture)}{drawing}</div>
<div class="answers"><div><b>unpruned</b>{escape(found.whole) or "(nothing)"}</div>
<div class="pruned"><b>pruned</b>{escape(found.pruned) or "(nothing)"}</div></div></div>"""


def _img(data: bytes, side: int, name: str) -> str:
    """Return a picture inside the page, made smaller."""
    with Image.open(io.BytesIO(data)) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img src="{url}" alt="{escape(name)}">'
