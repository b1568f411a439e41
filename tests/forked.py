"""Programs whose vLLM is there already: servers forked from one process that has imported it.

A server's processes each import vLLM for half a minute of a core where they are spawned, as the
CPU's vLLM does. ``FORKED`` begins the command of a program whose own processes are forked:

    forked.py SCRIPT ARGUMENTS, or forked.py -c CODE ARGUMENTS

and ``start_server`` starts such a command as a fork too. That a server works as it starts by
itself is shown by the first of `tests/server/conftest.py` and by all of
`tests/server/test_kills.py`.
"""

import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

from era_vllm.lab.servers import Server, free_port

FORKED = (sys.executable, str(Path(__file__)))
"""What such a command begins with."""
VARIABLES = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
"""What was so when torch was imported: forks cannot change it. vLLM compiles its log-probability
helper for 18 s."""
VARIABLES |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
RUN_S = 600.0
IMPORT_S = 300.0
SERVES = (
    "era_vllm_server.app",
    "era_vllm.cli.main",
    "era_vllm.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.models.llava",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)
"""What servers import."""


def start_server(
    name: str, command: Sequence[str], variables: Mapping[str, str], log: Path
) -> Server:
    """Start a server, forked where its command says so; returns it before it answers."""
    if tuple(command[:2]) == FORKED:
        return Forked(name, command, variables, log)
    return Server(name, command, variables, log)


def run(command: Sequence[str], log: Path) -> str:
    """Run a command that begins with ``FORKED``; return what it printed, or fail with it.

    Nothing that it started may be left.
    """
    child = parent().start(command[2:], VARIABLES, str(log))
    try:
        code = child.wait(RUN_S)
        end = time.monotonic() + 10
        while (left := alive(child.pid)) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        said = log.read_text(errors="replace")
        print(said[-6000:])
    assert (code, left) == (0, {}), said[-6000:]
    return said


def alive(session: int) -> dict[int, str]:
    """Processes of a session that have not ended, by their command lines."""
    found: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile
            state, *numbers = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if state != "Z" and int(numbers[2]) == session:
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    return found


class Forked(Server):
    """A server that is a fork."""

    def __init__(
        self, name: str, command: Sequence[str], variables: Mapping[str, str], log: Path
    ) -> None:
        self.name, self.log, self.port, self._alive = name, log, free_port(), -1
        words = [*command[2:], "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = parent().start(words, dict(variables), str(log))


@cache
def parent() -> "Parent":
    """Return the one of this process, which takes half a minute to be there."""
    return Parent()


class Parent:
    """The process that servers are forked from; as it loses this one, it ends them.

    Its environment, and so theirs, is that of now.
    """

    def __init__(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.asked = 0
        kept = {name: os.environ[name] for name in os.environ if not name.startswith("VLLM_")}
        kept |= VARIABLES
        command = [*FORKED, "--serve", str(theirs.fileno())]
        self.process = subprocess.Popen(
            command,
            env=kept,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()

    def start(self, *job: object) -> "Child":
        """Fork a program: words, variables beside those of now, log."""
        return Child(self, self.ask("start", *job))

    def ask(self, *what: object) -> int | None:
        """Send something and wait for what comes of it, past answers that nobody waited for."""
        self.asked += 1
        self.pipe.send((self.asked, *what))
        number = 0
        while number != self.asked:
            assert self.pipe.poll(IMPORT_S), "the parent of forked servers does not answer"
            number, found = self.pipe.recv()
        return found


class Child:
    """A fork, asked like a ``subprocess.Popen``."""

    def __init__(self, parent: Parent, pid: int) -> None:
        self.parent, self.pid, self.returncode = parent, pid, None

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self.parent.ask("poll", self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for its end.

        Raises:
            TimeoutExpired: it still runs.
        """
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked server", timeout)
            time.sleep(0.05)
        return code


def _serve(pipe: Connection) -> list[str]:
    """Fork what is asked for until nobody asks any more; a fork returns its words."""
    codes: dict[int, int | None] = {}
    pid, job = -1, []
    with suppress(EOFError, OSError):  # who asked has ended, maybe while it waited for an answer
        while pid:
            number, what, *job = pipe.recv()
            if what == "poll":
                (child,) = job
                if codes[child] is None:
                    found, status = os.waitpid(child, os.WNOHANG)
                    codes[child] = os.waitstatus_to_exitcode(status) if found else None
                pipe.send((number, codes[child]))
                continue
            leads, led = os.pipe()
            if pid := os.fork():
                os.close(led)
                os.read(leads, 1)  # its end: the fork leads a group of its own
                os.close(leads)
                codes[pid] = None
                pipe.send((number, pid))
    if not pid:
        words, variables, log = job
        os.setsid()
        for end in (leads, led):
            os.close(end)
        pipe.close()
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for number in (1, 2):
            os.dup2(sink, number)
        os.close(sink)
        os.environ.update(variables)
        return words
    for how in (signal.SIGTERM, signal.SIGKILL):
        for child in codes:
            with suppress(OSError):
                os.killpg(child, how)
        time.sleep(2)
    os._exit(0)


def main() -> None:
    """Take this file's place by the program's."""
    from vllm.platforms import current_platform
    from vllm.utils import system_utils  # before those who take the function from it

    if current_platform.is_cpu():
        system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    _, program, *words = sys.argv
    if program == "--serve":
        for module in SERVES:
            importlib.import_module(module)
        program, *words = _serve(Connection(int(words[0])))
    if program == "-c":
        sys.path[0], code = "", words.pop(0)
        sys.argv = ["-c", *words]
        exec(code, {"__name__": "__main__"})  # noqa: S102
        return
    sys.path[0], sys.argv = str(Path(program).parent), [program, *words]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
