"""Shape and type checks over the torch-only core, deterministic hypothesis, one thread.

The import hook has to be installed before anything imports those modules, so it stands first.
``config`` is left out (it refuses wrong types itself, with its own error), and so is the registry
in ``policies/__init__`` (beartype has no answer to ``type[Protocol]``).
"""

import os
import re
import sys
from functools import cache
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

POLICIES = Path(__file__).parents[1] / "era_vllm" / "policies"
CHECKED = (
    "era_vllm.types",
    "era_vllm.contracts",
    "era_vllm.pipeline",
    "era_vllm.steps",
    *(f"era_vllm.policies.{file.stem}" for file in POLICIES.glob("[!_]*.py")),
    "era_vllm.attention.reference",
)

if early := sorted(set(CHECKED) & set(sys.modules)):
    raise RuntimeError(f"imported before their type checks were installed: {', '.join(early)}")
install_import_hook(CHECKED, "beartype.beartype")

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile(
    "default", derandomize=True, deadline=None, database=None, max_examples=25
)
settings.register_profile("long", settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Collect what marked tests measure; here, as xdist's first process reads no other file."""
    from tests import situations

    situations.collect(config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Take the place of `--dist loadgroup`: a process for all the files that ask the same servers.

    xdist's own reads groups off markers, and loses them with pytest 9.2.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByServers(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _servers_of(config.rootpath / nodeid.partition("::")[0])

    return ByServers(config, log)


@cache
def _servers_of(file: Path) -> str:
    """Name the fixture of tests/server whose servers a file asks, or the file."""
    text = file.read_text()
    if '"tests.server.guarded"' in text:
        return "pair"
    asks = file.parent.name == "server" and re.search(r"^def \w+\(.*\bservers\b", text, re.M)
    return "servers" if asks and "def servers(" not in text else str(file)
