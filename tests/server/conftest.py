"""One real server, shared, and one started from the command line that it prints."""

import importlib
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from era_vllm.lab.servers import Server, wait_for

with warnings.catch_warnings():  # torch and vLLM use what they deprecate
    warnings.simplefilter("ignore")
    importlib.import_module("vllm.model_executor.layers.attention")

LIMITS = ["--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M"]
ERA_VLLM = str(Path(sys.executable).with_name("era-vllm"))


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
    folder = tmp_path_factory.mktemp("servers")
    serve = [ERA_VLLM, "serve", *LIMITS]
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("VLLM_")]:
            patch.delenv(name)  # other tests' own
        first = stack.enter_context(Server("serve", serve, variables, folder / "serve.log"))
        command = [*serve, "--print-command"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        words = shlex.split(printed.strip().splitlines()[-1])
        assert words[:2] == ["vllm", "serve"]
        launcher = "import sys; from era_vllm_server.app import run; run(sys.argv[1:])"
        plain = [sys.executable, "-c", launcher, *words[2:]]
        second = stack.enter_context(Server("printed", plain, variables, folder / "printed.log"))
        wait_for([first, second])
        yield first, second
