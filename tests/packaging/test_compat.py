"""Private symbols of others stand in ``era_vllm/compat`` alone, with their bounds and their end."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from era_vllm.compat import versions
from era_vllm.errors import UnsupportedError

ROOT = Path(__file__).parents[2]
COMPAT = ROOT / "era_vllm" / "compat"
SERVER = ROOT / "server" / "era_vllm_server"
LIBRARIES = ("vllm", "uvicorn", "starlette", "fastapi", "h11", "pydantic", "pydantic_core", "PIL")
SEAMS = ("vllm.entrypoints", "vllm.v1", "uvicorn.protocols")
"""What moves from one version to the next."""
FREE = (ROOT / "era_vllm" / "cli", ROOT / "era_vllm" / "bench")
"""Ask and measure a vLLM that is there; nothing is served through them."""
PYTHONS = frozenset({"_SubParsersAction", "_option_string_actions", "_exit"})
"""Python's own: argparse has no public name for them, and that of ``os`` is one."""
SOURCES = [*SERVER.rglob("*.py"), *(ROOT / "era_vllm").rglob("*.py")]
OURS = [path for path in SOURCES if COMPAT not in path.parents]


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full names that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def own_names() -> set[str]:
    """Return every name with an underscore that our own code defines."""
    found = set[str]()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_symbol_is_imported_elsewhere(path):
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        private = parts[0] in LIBRARIES and any(part.startswith("_") for part in parts)
        assert not private, name
        if not set(FREE) & set(path.parents):
            assert not name.startswith(SEAMS), name


def test_no_private_attribute_of_others_is_read_elsewhere():
    ours, found = own_names(), []
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                dunder = node.attr.startswith("__")
                if not (dunder or node.attr in PYTHONS or node.attr in ours):
                    found.append((path.name, node.lineno, ast.unparse(node)))
    assert found == []


@pytest.mark.parametrize("path", sorted(COMPAT.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_seam_says_where_it_is_and_when_it_ends(path):
    if path.stem == "versions":
        return
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    assert "pstream" in text and "emove" in text, path.name


def test_the_server_checks_the_versions(monkeypatch):
    versions.check_server_versions()
    monkeypatch.setitem(versions.BOUNDS, "uvicorn", ("0.1", "0.2"))
    with pytest.raises(UnsupportedError, match=r"uvicorn: got version .*, needed from 0.1 and"):
        versions.check_server_versions()
    monkeypatch.setenv(versions.OVERRIDE, "1")
    versions.check_server_versions()
