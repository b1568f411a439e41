"""What a cache key says of the code that made the numbers."""

import shutil
import sys
from pathlib import Path

import pytest

import era_vllm
from era_vllm.vllm_plugin import build as module

ROOT = Path(era_vllm.__file__).parent


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's sources, which ``build`` takes for ours."""
    copy = tmp_path / "era_vllm"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__", "samples", "*.pt"))
    stock = module.inspect.getfile
    monkeypatch.setattr(
        module.inspect,
        "getfile",
        lambda what: str(copy / "__init__.py") if what is era_vllm else stock(what),
    )
    return copy


def build(policy="era", family="era_vllm.models.llava:EraLlavaForConditionalGeneration"):
    """Ask anew."""
    return module.build.__wrapped__(policy, family)


def test_a_change_of_what_makes_numbers_is_another_build(package):
    before = build()
    assert before.startswith(f"{era_vllm.__version__} ") and build("dpp") == before
    for name in ("pipeline.py", "steps/merge.py", "attention/layer.py", "vllm_plugin/thin.py"):
        path = package / name
        path.write_text(path.read_text() + "\n# another\n")
        after = build()
        assert after != before, name
        before = after
    (package / "cli" / "main.py").write_text("# other words, the same numbers\n")
    assert build() == before


def test_a_policy_from_elsewhere_has_a_mark_of_its_own(package, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    source = (ROOT / "policies" / "uniform.py").read_text()
    path = tmp_path / "elsewhere" / "their_policy.py"
    path.parent.mkdir()
    path.write_text(source)
    try:
        first = build("their_policy:Policy")
        assert first.startswith(build()) and first != build()
        path.write_text(source + "\n# a fix\n")
        assert build("their_policy:Policy") not in (first, build())
    finally:
        sys.modules.pop("their_policy", None)


def test_a_family_from_elsewhere_has_a_mark_of_its_own(package, tmp_path, monkeypatch):
    """Its layout and its signals decide which tokens a cache holds."""
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "their_family.py"
    path.write_text("class Model: ...\n")
    try:
        first = build(family="their_family:Model")
        assert first.startswith(build()) and first != build()
        path.write_text("class Model: ...  # a fix\n")
        assert build(family="their_family:Model") not in (first, build())
    finally:
        sys.modules.pop("their_family", None)
