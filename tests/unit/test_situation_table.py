"""``docs/situations.md`` keeps up with the code: situations, tests, refusals; not the numbers."""

import re

from era_vllm.vllm_plugin.refusals import REFUSALS
from tests.situations import (
    NO_TEST,
    ROOT,
    SITUATIONS,
    TABLE,
    Measured,
    Result,
    render,
)

SOURCES = [*ROOT.glob("tests/engine/test_*.py"), *ROOT.glob("tests/gpu/test_*.py")]


def rows() -> list[list[str]]:
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_situation_is_in_the_table() -> None:
    named = {row[0].partition(" (")[0] for row in rows()}
    assert not {*SITUATIONS, *NO_TEST} - named


def test_every_refusal_is_in_the_table_as_the_code_has_it() -> None:
    written = {(row[0], row[1]) for row in rows()}
    for refusal in REFUSALS:
        assert (refusal.feature, f"{refusal.why}; {refusal.instead}") in written


def test_every_test_that_the_table_names_exists_and_is_marked() -> None:
    named = re.findall(r"`((?:engine|gpu)/\w+\.py)::(\w+)`", TABLE.read_text())
    assert named
    for file, test in named:
        marked = rf"@pytest\.mark\.situation\([^)]*\)\n(?:@[^\n]*\n|    [^\n]*\n|\)\n)*def {test}\("
        assert re.search(marked, (ROOT / "tests" / file).read_text()), f"{file}::{test}"


def test_every_mark_is_a_situation() -> None:
    marks = r"mark\.situation\((GPU \+ )?\"([^\"]+)\"\)"
    used = [name for source in SOURCES for _, name in re.findall(marks, source.read_text())]
    assert used
    assert not set(used) - set(SITUATIONS)


def test_a_test_that_fails_or_is_skipped_is_not_shown_as_exact() -> None:
    number = (Measured("original", "key_columns", 1e-5, 2.0, 1e-4, "vec16"),)
    results = {
        "tests/engine/test_a.py::test_good[x]": Result(
            "bf16", "passed", "", number, ("3 drafts",), "29832b7", "Some CPU (AVX2)"
        ),
        "tests/engine/test_a.py::test_bad": Result("preemption", "failed", "", number),
        "tests/gpu/test_a.py::test_gpu": Result("prefix hit", "skipped", "needs a GPU", ()),
    }
    page = render(results, {"everything": "no reason"})
    exact, _, rest = page.partition("## Refused")
    assert (
        "| bf16 (3 drafts) | Llava | original | key_columns | `engine/test_a.py::test_good` |"
        in exact
    )
    assert "| Some CPU (AVX2), vec16, 29832b7 |" in exact
    assert "test_bad" not in page
    assert "| preemption | **fails**: 1 of 1 tests |" in rest
    assert "| prefix hit | needs a GPU |" in rest
    assert "| everything | no reason |" in rest
