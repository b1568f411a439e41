"""What a docstring or a page names is there: modules, names, files, and pages that are linked."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
SOURCES: Final = [
    path
    for folder in ("era_vllm", "server/era_vllm_server", "deploy", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
PAGES: Final = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/*.md")]
_FILE: Final = re.compile(r"[\w./-]+\.(?:py|md|sh|yaml|toml|svg)\b")
_QUOTED: Final = re.compile(r"``([^`\n]+)``")
_NAME: Final = re.compile(r"_?[A-Za-z]\w*(?:\.\w+)*(?:\(\))?")
_LINK: Final = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_METHODS: Final = re.compile(r"\bMETHODS\b|\bHOUSE\b|\bREVIEW\b")
FOREIGN: Final = {
    "multiproc_executor.py",  # vLLM's
    "_resolve_auto_dtype",
    "ProcessingInfo",
    "_call_hf_processor",
    "serve_http",
    "takes_video",
    "mrope_position_delta",
    "_get_and_verify_max_len",
    "PR_SET_PDEATHSIG",  # Linux's
    "http_requests_total",  # a metric of vLLM's server
}
"""Files and names of libraries that a docstring may quote."""


def texts() -> Iterator[tuple[Path, str]]:
    """Yield every docstring, attribute docstrings among them."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            inner = node.value if isinstance(node, ast.Expr) else None
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                yield path, inner.value


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every identifier and every word in quotes of the sources, and what vLLM's files define."""
    found: set[str] = set()
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        found.update(path.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(text)
        for node in ast.walk(tree):
            for name in ("name", "id", "attr", "arg", "module", "asname"):
                value = getattr(node, name, None)
                found.update(str(value).split(".") if isinstance(value, str) else ())
            value = node.value if isinstance(node, ast.Constant) else None
            if isinstance(value, str) and not _is_docstring(value):
                found.update(re.findall(r"\w+", value))
    return found


def _is_docstring(text: str) -> bool:
    return text.rstrip().endswith((".", ":", ".\n")) and " " in text


def test_files_that_docstrings_name_are_there() -> None:
    names = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts}
    lost = [
        f"{path.relative_to(ROOT)}: {file}"
        for path, text in texts()
        for file in _FILE.findall(text)
        if Path(file).name not in names | FOREIGN and not _foreign(text, file)
    ]
    assert not lost


def _foreign(text: str, file: str) -> bool:
    """Upstream files are cited with a line or below their package."""
    cited = re.search(re.escape(file) + r":\d", text)
    return bool(cited) or "/" in file and file.split("/")[0] not in ("era_vllm", "docs", "tests")


def test_names_that_docstrings_quote_are_there(known: set[str]) -> None:
    lost = [
        f"{path.relative_to(ROOT)}: {quoted}"
        for path, text in texts()
        for quoted in _QUOTED.findall(text)
        if _NAME.fullmatch(quoted)
        and "Upstream" not in text
        and not set(quoted.removesuffix("()").split(".")) & (known | FOREIGN)
    ]
    assert not lost


def test_no_text_cites_what_is_not_in_the_repository() -> None:
    lost = [str(path.relative_to(ROOT)) for path, text in texts() if _METHODS.search(text)]
    lost += [str(p.relative_to(ROOT)) for p in PAGES if _METHODS.search(p.read_text("utf-8"))]
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = _LINK.findall(page.read_text(encoding="utf-8"))
    own = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in own if not (page.parent / link).exists()] == []
