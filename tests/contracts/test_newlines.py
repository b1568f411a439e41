"""docs/families.md: what newlines cost is what plans keep."""

import re
from pathlib import Path

import pytest

from era_vllm.config import EraConfig
from era_vllm.models.anyres import Tiling, tiled
from era_vllm.plan import plan

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
SIDES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
PUBLISHED = Tiling(tuple((336 * rows, 336 * columns) for rows, columns in SIDES), 336, 24)
"""LLaVA-NeXT's, over CLIP-L/14-336."""
ROWS = re.findall(r"^\| (\d+) x (\d+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize(("height", "width", "rest"), ROWS)
def test_the_table_of_newlines(height: str, width: str, rest: str) -> None:
    cells = rest.split(" | ")
    assert cells[3] == ".778 / .944"
    rows = tiled(PUBLISHED, int(height), int(width), "rows")
    facts = rows.length, len(rows.segments), len(rows.separators)
    assert cells[:3] == [str(fact) for fact in facts]
    for said, separators in zip(cells[4:], ("rows", "tile_rows", "none"), strict=True):
        layout = tiled(PUBLISHED, int(height), int(width), separators)
        kept = [sum(plan(layout, rate, EraConfig()).kept) for rate in (0.778, 0.944)]
        assert said == f"{kept[0]} / {kept[1]}"


def test_the_table_has_rows() -> None:
    assert len(ROWS) == 7
