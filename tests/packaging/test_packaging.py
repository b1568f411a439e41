"""Installing era-vllm leaves an existing vLLM as it is, and importing it costs nothing."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]


def run(*command: str) -> str:
    """Run this environment's Python; return its standard output, fail with its standard error."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.vllm
def test_installing_over_vllm_changes_no_installed_package() -> None:
    arguments = "--quiet --dry-run --no-build-isolation --disable-pip-version-check --report -"
    report = json.loads(run("-m", "pip", "install", *arguments.split(), "."))
    installed = {package["metadata"]["name"] for package in report["install"]}
    assert installed == {"era-vllm"}


@pytest.mark.parametrize("extra", ["cuda", "cpu"])
def test_core_needs_no_vllm(extra: str) -> None:
    of_extra = {Requirement(line).name for line in PROJECT["optional-dependencies"][extra]}
    assert of_extra.isdisjoint(requirement.name for requirement in CORE)


@pytest.mark.vllm
@pytest.mark.parametrize("ours", CORE, ids=str)
def test_no_bound_is_tighter_than_vllms(ours: Requirement) -> None:
    """No ceiling of ours, and no floor but one that every version vLLM takes is above."""
    assert all(bound.operator == ">=" for bound in ours.specifier), "a ceiling or a pin"
    for theirs in map(Requirement, requires(packages_distributions()["vllm"][0]) or ()):
        same = canonicalize_name(theirs.name) == canonicalize_name(ours.name)
        if not same or (theirs.marker is not None and not theirs.marker.evaluate({"extra": ""})):
            continue
        floors = [bound.version for bound in theirs.specifier if bound.operator in (">=", "==")]
        if floors:
            assert all(ours.specifier.contains(floor, prereleases=True) for floor in floors)
        else:
            assert not ours.specifier, f"vLLM takes any {theirs.name}"


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = run("-c", "import era_vllm, sys; print(*sys.modules)").split()
    assert "era_vllm" in loaded
    assert not {"torch", "transformers", "vllm"} & set(loaded)


def test_console_script_and_plugin_point_at_what_exists() -> None:
    points = {**PROJECT["scripts"], **PROJECT["entry-points"]["vllm.general_plugins"]}
    for target in points.values():
        module, name = target.split(":")
        run("-c", f"import {module}; assert callable({module}.{name})")
