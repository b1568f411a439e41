"""Asks for /health all the time, in a process of its own, and watches a process's memory.

Its own process: a client that writes 30 MB keeps its interpreter, and would see gaps of its own.
"""

import http.client
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

import psutil

_EVERY_S: Final = 0.01
_AFTER_S: Final = 0.1
"""So long it goes on behind an answer: work that goes on behind it counts."""
_LIMIT_S: Final = 120.0
_MIB: Final = 2**20


@dataclass(slots=True)
class Sample:
    """What was seen while a body was served."""

    gap_s: float = 0.0
    """The longest that /health took."""
    mib: float = 0.0
    """Most memory over that at the begin."""
    ended: bool = False
    """The server did not answer at all any more, or took too much and was killed."""
    status: str = ""
    seconds: float = 0.0


class Probe:
    """The watching process."""

    def __init__(self, port: int, pid: int, kill_mib: float) -> None:
        """Begin to watch.

        Args:
            port: Of the server.
            pid: Whose memory counts.
            kill_mib: Resident MiB at which it is killed, before the machine is.
        """
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(
            target=_watch, args=(theirs, port, pid, kill_mib), daemon=True
        )
        self._process.start()

    @contextmanager
    def watching(self) -> Iterator[Sample]:
        """Watch for as long as the block runs; the sample is filled at its end."""
        sample = Sample()
        self._pipe.send("begin")
        self._pipe.recv()
        yield sample
        time.sleep(_AFTER_S)
        self._pipe.send("end")
        sample.gap_s, sample.mib, sample.ended = self._pipe.recv()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()


def _watch(pipe: Connection, port: int, pid: int, kill_mib: float) -> None:
    process = psutil.Process(pid)
    while pipe.recv() == "begin":
        base = most = process.memory_info().rss
        gap, ended = 0.0, False
        pipe.send("watching")
        while True:
            started = time.monotonic()
            ended |= not _healthy(port)
            gap = max(gap, time.monotonic() - started)
            try:
                most = max(most, process.memory_info().rss)
                if most > kill_mib * _MIB:
                    process.kill()
            except psutil.NoSuchProcess:
                ended = True
            if pipe.poll(_EVERY_S):
                break
        pipe.recv()
        pipe.send((gap, (most - base) / _MIB, ended))


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LIMIT_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
