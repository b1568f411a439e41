"""Processes of a demo and of a plugin, a command line in a folder: none is left, none is caught."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from era_vllm.cli import demo
from era_vllm.cli.main import main

DEMO = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what runs the tests may ignore it (nohup)
from pathlib import Path
from era_vllm.cli import demo
from era_vllm.cli.main import main
from era_vllm.lab.servers import Server

def answers():
    sleep = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(100)"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", child, sleep]
    with Server("1", command, {}, Path("log")) as one, Server("2", command, {}, Path("log")) as two:
        print(one._process.pid, two._process.pid, flush=True)
        time.sleep(100)

demo._answers, demo.find_spec = answers, lambda name: True
sys.exit(main(["demo", "--fast"]))
"""
"""``era-vllm demo`` with servers whose engines sleep and ignore SIGTERM, as vLLM's may; prints the
servers' process ids, which are those of their groups."""


FAMILY = """
import multiprocessing, os, signal, sys, time

def child():
    from era_vllm import register
    register()
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

if __name__ == "__main__":
    multiprocessing.get_context(sys.argv[1]).Process(target=child).start()
    time.sleep(100)
"""
"""A process and its child, which loads our plugin, says its process id, and stops."""


@pytest.mark.parametrize(
    ("connector", "method"),
    [
        ("era", "spawn"),
        pytest.param("http", "spawn", marks=pytest.mark.slow),
        pytest.param("era", "fork", marks=pytest.mark.slow),
        pytest.param("era", "forkserver", marks=pytest.mark.slow),
    ],
)
def test_a_child_ends_with_its_parent_in_a_server_of_ours(
    connector: str, method: str, tmp_path: Path
) -> None:
    file = tmp_path / "family.py"
    file.write_text(FAMILY)
    parent = subprocess.Popen(
        [sys.executable, str(file), method],
        env={**os.environ, "VLLM_MEDIA_CONNECTOR": connector},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        _wait(lambda: _state(child) == "T")
        parent.kill()
        parent.wait()
        try:
            if connector == "era":
                _wait(lambda: _state(child) in (None, "Z"))
            else:  # stock: as vLLM does
                time.sleep(1)
                assert _state(child) == "T"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)


def _state(process: int) -> str | None:
    """What a process does, by its letter in /proc."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("how", "code"),
    [(signal.SIGHUP, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)],
    ids=lambda value: str(value),
)
def test_no_server_outlives_the_demo(how: signal.Signals, code: int, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DEMO], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        servers = [int(word) for word in running.stdout.readline().split()]
        assert len(servers) == 2
        _wait(lambda: all(_running(server) >= 3 for server in servers))  # guard, server, engine
        running.send_signal(how)
        assert running.wait(20) == code
    _wait(lambda: not any(map(_running, servers)))


def _running(group: int) -> int:
    """How many processes of a group are there and not ended."""
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            found += state != "Z" and int(its_group) == group
    return found


def _wait(happens: Callable[[], bool], limit_s: float = 15) -> None:
    end = time.monotonic() + limit_s
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_hangup_that_is_ignored_stays_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under nohup."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    monkeypatch.setattr(demo, "_answers", lambda: {})
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert main(["demo", "--fast"]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == demo._stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_module_in_the_users_folder_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    help_of_serve = [*demo.MODULE, "era_vllm.cli.main", "serve", "--help"]
    ended = subprocess.run(help_of_serve, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "era-vllm serve MODEL" in ended.stdout
