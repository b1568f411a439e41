"""One real server, shared, and one started from the command line that it prints.

``started`` gives a test file servers of its own.
"""

import importlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from era_vllm.lab.servers import Server, wait_for
from tests.forked import FORKED, VARIABLES, run, start_server

with warnings.catch_warnings():  # torch and vLLM use what they deprecate
    warnings.simplefilter("ignore")
    importlib.import_module("vllm.model_executor.layers.attention")

LIMITS = ["--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M"]
LIMITS += ["--era-policy", "era"]
"""Flags of nearly every server here: what it may take, and the policy that reads attention."""
ERA_VLLM = str(Path(sys.executable).with_name("era-vllm"))
SERVE = (*FORKED, ERA_VLLM)
"""The same as a fork, which starts in a quarter of the time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Third-party warnings inside vLLM are not ours to mend."""
    for item in items:
        if "tests/server" in str(item.path):
            item.add_marker("vllm")
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """``era-vllm serve`` with its defaults, and the plain command that it prints.

    The first is spawned as users start it, but compiles nothing, as all servers of tests. The plain
    command's arguments run through vLLM's launcher from Python, since the ``vllm``
    script of the CPU wheel dies at its own start.
    """
    folder = tmp_path_factory.mktemp("servers")
    with starting(folder, {"serve": ([ERA_VLLM, "serve", *LIMITS], {})}) as (first,):
        printed = run([*SERVE, "serve", *LIMITS, "--print-command"], folder / "command")
        (line,) = (line for line in printed.splitlines() if " vllm serve " in line)
        words = shlex.split(line)
        at = words.index("vllm")
        assert words[at : at + 2] == ["vllm", "serve"]
        variables = dict(word.split("=", 1) for word in words[:at])
        launcher = "import sys; from era_vllm_server.app import run; run(sys.argv[1:])"
        plain = [*FORKED, "-c", launcher, *words[at + 2 :]]
        with started(folder, {"printed": (plain, variables)}) as (second,):
            wait_for([first])
            yield first, second


@contextmanager
def starting(
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
        yield [
            stack.enter_context(
                start_server(name, command, {**VARIABLES, **variables}, folder / f"{name}.log")
            )
            for name, (command, variables) in commands.items()
        ]


@contextmanager
def started(
    folder: Path, commands: Mapping[str, tuple[Sequence[str], Mapping[str, str]]]
) -> Iterator[list[Server]]:
    """The same, once all of them answer."""
    with starting(folder, commands) as servers:
        wait_for(servers)
        yield servers


def clean() -> dict[str, str]:
    """Return the environment without vLLM's variables, which are other tests' own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
