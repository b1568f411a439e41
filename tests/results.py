"""README's table of results, out of the figures of ``era-vllm eval``.

    .venv/bin/python -m tests.results      # docs/fidelity/sample.json -> README.md

Rows are policies as they come, rows of a rate are means over families without yes/no questions.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
FIGURES: Final = ROOT / "docs" / "fidelity" / "sample.json"
SHOWN: Final = {
    "dpp": "`dpp`",
    "era": "`era` (the paper's method)",
    "random": "`random`",
    "uniform": "`uniform`",
    "pool": "`pool`",
}
"""Policies and their names, in the table's order."""
_MARKS: Final = "<!-- results -->", "<!-- end of results -->"


def table(figures: Mapping[str, Any]) -> str:
    """Return Markdown: right answers by policy and rate."""
    rows = {(row["variant"], row["rate"]): row for row in figures["rows"]}
    rates = sorted({rate for _, rate in rows})
    whole = rows["unpruned", 0.0]
    first = next(iter(SHOWN))
    tokens = [rows[first if rate else "unpruned", rate]["tokens"] for rate in rates]

    def line(name: str, cells: list[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    lines = [line("rate removed", [f"{rate:g}".lstrip("0") or "0" for rate in rates])]
    lines += ["|" + "---|" * (1 + len(rates))]
    lines += [line(f"tokens of {whole['tokens']:g}", [f"{count:g}" for count in tokens])]
    for policy, name in SHOWN.items():
        right = [rows[policy if rate else "unpruned", rate]["right"]["value"] for rate in rates]
        lines.append(line(name, [f"{100 * value:.1f} %" for value in right]))
    return "\n".join(lines)


def put(page: str, made: str) -> str:
    """Return a page with the table between its marks."""
    start, end = _MARKS
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    assert len(pattern.findall(page)) == 1, "one pair of marks"
    return pattern.sub(lambda _: f"{start}\n{made}\n{end}", page)


def readme() -> str:
    """Return the README as it should be."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    return put((ROOT / "README.md").read_text(encoding="utf-8"), table(figures))


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    print("README.md")
