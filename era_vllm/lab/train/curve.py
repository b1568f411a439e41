"""The curve of a training: a line of JSON every few steps, and a picture of them.

Leaves out what is measured (``loop.py``).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

LINES: Final = "curve.jsonl"
PICTURE: Final = "curve.png"
_LOSSES: Final = ("tower", "text", "text_picture", "text_several", "text_film")


def append(folder: Path, line: Mapping[str, object]) -> None:
    """Write a line."""
    with (folder / LINES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def cut(folder: Path, step: int) -> None:
    """Drop the lines behind a step: of a training that ended without being saved.

    Args:    step: That training goes on from; 0: it begins, and what is there is another's.
    """
    file = folder / LINES
    if not file.exists():
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if 0 < _step(line) <= step]
    if kept != lines:
        new = folder / f"{LINES}.new"
        new.write_text("".join(kept), encoding="utf-8")
        new.replace(file)


def _step(line: str) -> int:
    """Return the step of a line; -1 of one that was cut off."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else -1
    except ValueError:
        return -1


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the lines."""
    text = (folder / LINES).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def draw(folder: Path) -> None:
    """Draw losses, and right answers by family, over tasks; minutes stand above."""
    from matplotlib.figure import Figure

    lines = read(folder)
    figure = Figure((11, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for name in _LOSSES:
        known = [line for line in lines if name in line]
        above.plot([x["seen"] for x in known], [x[name] for x in known], label=name, lw=0.8)
    above.set_yscale("log")
    above.set_ylabel("loss")
    above.legend()
    asked = [line for line in lines if "dev" in line]
    for index, family in enumerate(dict.fromkeys(name for line in asked for name in line["dev"])):
        known = [line for line in asked if family in line["dev"]]
        rights = [100 * line["dev"][family][0] / line["dev"][family][1] for line in known]
        style = ("-", "--", ":")[index // 7]
        below.plot([line["seen"] for line in known], rights, f"{style}.", label=family)
    below.set_ylabel("held-out questions right, %")
    below.set_xlabel("tasks")
    below.set_ylim(0, 101)
    below.legend(ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    for line in asked:
        above.text(line["seen"], above.get_ylim()[1], f"{line['minutes']:.0f} min", fontsize=7)
    figure.savefig(folder / PICTURE, dpi=90)
