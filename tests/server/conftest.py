"""One real server, shared, and one started from the command line that it prints."""

import importlib
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

with warnings.catch_warnings():  # torch and vLLM use what they deprecate
    warnings.simplefilter("ignore")
    importlib.import_module("vllm.model_executor.layers.attention")

LIMITS = ["--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M"]
START_S = 300
ERA_VLLM = str(Path(sys.executable).with_name("era-vllm"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Third-party warnings inside vLLM are not ours to mend."""
    for item in items:
        if "tests/server" in str(item.path):
            item.add_marker("vllm")
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self) -> "Server":
        """Return when it answers; fail with its log when it does not."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise AssertionError(f"server did not start:\n{self.log.read_text()[-4000:]}")


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: list[str], port: int, log: Path, **variables: str) -> Server:
    """Start a server process whose output goes to a file."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    process = subprocess.Popen(
        command,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        env={**environment, "VLLM_CPU_OMP_THREADS_BIND": "nobind", **variables},
    )
    return Server(f"http://127.0.0.1:{port}", process, log)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """``era-vllm serve`` with its defaults, and the plain command that it prints for another port.

    Both start at once. The plain command's arguments run through vLLM's launcher from Python,
    since the ``vllm`` script of the CPU wheel dies at its own start.
    """
    folder = tmp_path_factory.mktemp("servers")
    ports = free_port(), free_port()
    first = [ERA_VLLM, "serve", "--port", str(ports[0]), *LIMITS]
    other = [ERA_VLLM, "serve", "--port", str(ports[1]), *LIMITS, "--print-command"]
    running = [start(first, ports[0], folder / "serve.log")]
    printed = subprocess.run(other, check=True, capture_output=True, text=True).stdout
    words = shlex.split(printed.strip().splitlines()[-1])
    assert words[:2] == ["vllm", "serve"]
    launcher = "import sys; from era_vllm_server.app import run; run(sys.argv[1:])"
    plain = [sys.executable, "-c", launcher, *words[2:]]
    running.append(start(plain, ports[1], folder / "printed.log"))
    try:
        yield running[0].wait(), running[1].wait()
    finally:
        for server in running:
            server.process.terminate()
        for server in running:
            server.process.wait(60)
