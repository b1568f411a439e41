"""One real server, shared, and one started from the command line that it prints.

``started`` gives a test file servers of its own.
"""

import importlib
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from era_vllm.lab.servers import Server, wait_for
from tests.forked import FORKED

with warnings.catch_warnings():  # torch and vLLM use what they deprecate
    warnings.simplefilter("ignore")
    importlib.import_module("vllm.model_executor.layers.attention")

LIMITS = ["--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M"]
LIMITS += ["--era-policy", "era"]
"""Flags of nearly every server here: what it may take, and the policy that reads attention."""
VARIABLES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
ERA_VLLM = str(Path(sys.executable).with_name("era-vllm"))
SERVE = (*FORKED, ERA_VLLM)
"""The same whose processes are forked, and which starts in half the time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Third-party warnings inside vLLM are not ours to mend."""
    for item in items:
        if "tests/server" in str(item.path):
            item.add_marker("vllm")
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """``era-vllm serve`` with its defaults, and the plain command that it prints.

    Both start at once. The plain command's arguments run through vLLM's launcher from Python,
    since the ``vllm`` script of the CPU wheel dies at its own start.
    """
    command = [ERA_VLLM, "serve", *LIMITS]
    printed = subprocess.run(
        [*command, "--print-command"], check=True, capture_output=True, text=True, env=clean()
    ).stdout
    words = shlex.split(printed.strip().splitlines()[-1])
    at = words.index("vllm")
    assert words[at : at + 2] == ["vllm", "serve"]
    variables = dict(word.split("=", 1) for word in words[:at])
    launcher = "import sys; from era_vllm_server.app import run; run(sys.argv[1:])"
    plain = [*FORKED, "-c", launcher, *words[at + 2 :]]
    commands = {"serve": (command, {}), "printed": (plain, variables)}
    with started(tmp_path_factory.mktemp("servers"), commands) as (first, second):
        yield first, second


@contextmanager
def started(
    folder: Path, commands: Mapping[str, tuple[Sequence[str], Mapping[str, str]]]
) -> Iterator[list[Server]]:
    """Start servers at once and stop them at the end.

    Args:
        folder: For their logs.
        commands: Name -> command and variables.
    """
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - clean().keys():
            patch.delenv(name)
        servers = [
            stack.enter_context(
                Server(name, command, {**VARIABLES, **variables}, folder / f"{name}.log")
            )
            for name, (command, variables) in commands.items()
        ]
        wait_for(servers)
        yield servers


def clean() -> dict[str, str]:
    """Return the environment without vLLM's variables, which are other tests' own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
