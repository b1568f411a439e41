"""Servers that a demonstration or a test starts beside itself, waits for, and always stops.

Each is a process group of its own with its log in a file, on a free port of this machine, and ends
also where this process is killed. Leaves out what is served: the caller gives the command.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from tqdm import tqdm

from era_vllm.errors import UnsupportedError
from era_vllm.lab.screen import interval_s

START_LIMIT_S: Final = 300.0
_STOP_LIMIT_S: Final = 5.0
_LOG_LINES: Final = 25
_NOT_INHERITED: Final = "VLLM_API_KEY"  # who asks these servers has no key
_GUARDED: Final = """
import os, signal, sys, time
alive = int(sys.argv[1])
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.read(alive, 1)  # the end of the pipe: its other end was in the process that has ended
    os.killpg(0, signal.SIGTERM)
    time.sleep(float(sys.argv[2]))
    os.killpg(0, signal.SIGKILL)
os.close(alive)
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""Runs a command in this process, and beside it a guard of the process group. PR_SET_PDEATHSIG
would not do: vLLM's server loses a SIGTERM while it starts, and its engine outlives its SIGKILL."""
_DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """One server process; a context manager that stops it."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        """Start it on a free port, which is appended to the command.

        Args:
            name: For messages.
            command: Without host and port.
            environment: Variables set beside this process's own (less vLLM's API key).
            log: Where both of its outputs go.
        """
        self.name = name
        self.port = free_port()
        self.log = log
        inherited = {name: os.environ[name] for name in os.environ if name != _NOT_INHERITED}
        theirs, self._alive = os.pipe()
        guarded = [sys.executable, "-I", "-S", "-c", _GUARDED, str(theirs), str(_STOP_LIMIT_S)]
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [*guarded, *command, "--host", "127.0.0.1", "--port", str(self.port)],
                env={**inherited, **environment},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(theirs,),
            )
        os.close(theirs)

    @property
    def pid(self) -> int:
        """Of the process that the command runs in, which leads the group."""
        return self._process.pid

    def wait(self, limit_s: float) -> int | None:
        """Return its exit code once it ends by itself, None if it has not by then."""
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ready(self) -> bool:
        """Ask for its health.

        Raises:
            UnsupportedError: it has ended; with the tail of its log.
        """
        if (code := self._process.poll()) is not None:
            raise UnsupportedError(f"{self.name} ended with exit code {code}; {self.tail()}")
        try:
            with _DIRECT.open(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def stop(self) -> None:
        """End its process group: ask, wait, then insist. Harmless when repeated."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None or how == signal.SIGKILL:
                try:
                    os.killpg(self._process.pid, how)
                except ProcessLookupError:
                    break
            try:
                self._process.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                continue
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    def tail(self) -> str:
        """Return the end of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join([f"the end of its log ({self.log}):", *lines])


def wait_for(servers: Sequence[Server], limit_s: float = START_LIMIT_S) -> None:
    """Wait until all of them answer, with a progress line.

    Raises:
        UnsupportedError: one has ended, or the time is over; with the tail of its log.
    """
    started = time.monotonic()
    form = "{desc}: {n_fmt} of {total_fmt} ready [{elapsed}]"
    waiting, shown = list(servers), started
    with tqdm(total=len(servers), desc="starting servers", bar_format=form) as bar:
        while waiting:
            still = [server for server in waiting if not server.ready()]
            now = time.monotonic()
            if len(still) < len(waiting) or now - shown >= interval_s():
                bar.n = len(servers) - len(still)
                bar.refresh()
                shown = now
            waiting = still
            if waiting and now - started > limit_s:
                late = waiting[0]
                raise UnsupportedError(f"{late.name} did not answer in time; {late.tail()}")
            time.sleep(0.3 if waiting else 0)


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
