"""kill -9 of each process of a server: nothing of it is left, and it says that it failed.

Prints who was killed, after how many seconds nothing was left, and the exit code (``-s`` shows it).
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import httpx
import pytest

from era_vllm.lab.servers import Server
from tests import forked
from tests.engine.random_llava import save_random_llava
from tests.server.asking import CHAT, MODEL, chat_body
from tests.server.conftest import ERA_VLLM, LIMITS, started

GONE_S = 10.0
SILENT_S = 3
"""Of --era-engine-timeout-s."""
NAMES = {"API server": "APIServer", "engine": "EngineCore", "worker": "Worker"}
TWO = ["--tensor-parallel-size", "2", "--api-server-count", "2"]
RANKS = ["--data-parallel-size", "2", "--api-server-count", "2"]


@contextmanager
def server_of(folder: Path, *flags: str) -> Iterator[Server]:
    """A server of two heads and more, which notices soon that its engine is silent."""
    save_random_llava(folder / "model")  # two ranks need an even number of heads
    own = ["--served-model-name", MODEL, "--era-engine-timeout-s", str(SILENT_S)]
    command = [ERA_VLLM, "serve", str(folder / "model"), *own, *LIMITS, *flags]
    with started(folder, {"killed": (command, {})}) as (server,):
        try:
            _wait(lambda: httpx.get(f"{server.url}/ready").status_code == 200, 60)
            yield server
        finally:
            for process in alive(server):
                os.kill(process, signal.SIGKILL)


def alive(server: Server) -> dict[int, str]:
    """Processes of a server's session that have not ended, but for the test's own guard."""
    found = forked.alive(server.pid)
    return {process: line for process, line in found.items() if " -I -S -c " not in line}


def resident_bytes(processes: dict[int, str]) -> int:
    """Memory of those that are still there."""
    pages = 0
    for process in processes:
        with suppress(OSError):
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _wait(happens, limit_s: float) -> float:
    """Wait until it happens; return after how many seconds."""
    started_s = time.monotonic()
    while not happens():
        assert time.monotonic() - started_s < limit_s
        time.sleep(0.1)
    return time.monotonic() - started_s


def kill(server: Server, who: str) -> None:
    """Kill one process while a long answer is under way, and look at what is left."""
    before = alive(server)
    title = NAMES.get(who, who)
    (victim, *_) = (
        [server.pid]
        if who == "main"
        else sorted(process for process, name in before.items() if title in name)
    )
    body = chat_body(max_tokens=900, ignore_eos=True)
    ask = Thread(target=_post, args=(server, body))
    ask.start()
    time.sleep(1)
    os.kill(victim, signal.SIGKILL)
    killed_s = time.monotonic()
    code = server.wait(60)
    _wait(lambda: not alive(server), 60)
    gone_s = time.monotonic() - killed_s
    left = resident_bytes(before)
    ask.join()
    row = {"killed": who, "processes": len(before), "gone_s": round(gone_s, 1), "code": code}
    print(json.dumps(row))
    assert code not in (None, 0)
    assert gone_s < GONE_S, server.log.read_text()[-3000:]
    assert left == 0


def _post(server: Server, body: dict[str, object]) -> None:
    with suppress(httpx.HTTPError):
        httpx.post(f"{server.url}{CHAT}", json=body, timeout=60)


def test_an_engine_that_hangs_is_not_ready_and_dies_with_its_server(tmp_path: Path) -> None:
    """Stopped, it runs nothing, not even what would end it."""
    with server_of(tmp_path) as server:
        (engine,) = [process for process, name in alive(server).items() if "EngineCore" in name]

        def ready() -> httpx.Response:
            return httpx.get(f"{server.url}/ready", timeout=5)

        assert ready().status_code == 200
        os.kill(engine, signal.SIGSTOP)
        seconds = _wait(lambda: ready().status_code == 503, SILENT_S + 10)
        assert seconds > SILENT_S - 1
        assert "the engine has not answered for" in ready().json()["reason"]
        assert httpx.get(f"{server.url}/health", timeout=5).status_code == 200  # it lives
        os.kill(engine, signal.SIGCONT)
        _wait(lambda: ready().status_code == 200, 10)
        os.kill(engine, signal.SIGSTOP)
        kill(server, "main")


@pytest.mark.slow
def test_a_server_ends_with_its_engine(tmp_path: Path) -> None:
    with server_of(tmp_path) as server:
        kill(server, "engine")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "who"),
    [
        ([], "worker"),
        (TWO, "main"),
        (TWO, "API server"),
        (TWO, "engine"),
        (TWO, "worker"),
        (RANKS, "main"),
        (RANKS, "engine"),
        (RANKS, "DPCoordinator"),
    ],
    ids=str,
)
def test_nothing_is_left(flags: list[str], who: str, tmp_path: Path) -> None:
    with server_of(tmp_path, *flags) as server:
        kill(server, who)
