"""docs/families.md and the README keep up with the families; not with the numbers."""

import re

import pytest

from era_vllm.vllm_plugin.families import FAMILIES

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def rows(page: str) -> dict[str, list[str]]:
    """First cell -> the others, of the table between the marks."""
    from tests import support

    text = (support.ROOT / page).read_text()
    assert support.put(text, "x") != text
    table = re.search("<!-- support -->\n(.*?)<!-- end", text, re.DOTALL)
    assert table is not None
    cells = [line.strip("|").split(" | ") for line in table[1].splitlines()]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in cells}


def test_every_family_is_in_the_support_matrix() -> None:
    from tests import support

    matrix, overview = rows("docs/families.md"), rows("README.md")
    for family in FAMILIES:
        pictures, *_ = matrix[support.NAMES[family]]
        architecture, takes, _, said = overview[support.NAMES[family]]
        assert architecture == f"`{family}`"
        assert takes.split(" and ") == [f"{name}s" for name in FAMILIES[family].modalities]
        assert said == support._said(family, pictures), "exact is what was measured"
