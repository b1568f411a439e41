"""The server's processes while it is under load: which there are, and what memory they hold."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Final

import psutil

ENGINE: Final = "EngineCore"
"""In the title of vLLM's engine process (vllm/utils/system_utils.py, 0.32.0)."""
_MIB: Final = 2**20
SETTLED: Final = 1 / 2
"""Share of the samples before memory is judged: caches fill first, and the allocator's and oneDNN's
grow with every new batch size, stock vLLM's as much as ours (docs/load.md)."""


@dataclass(slots=True)
class Watch:
    """Samples resident memory of a server's process and all below it."""

    pid: int
    times_s: list[float] = field(default_factory=list)
    mib: dict[str, list[float]] = field(default_factory=dict)
    """Process's name -> resident MiB at each time."""

    async def sample_forever(self, interval_s: float) -> None:
        """Sample until cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(interval_s)

    def sample(self) -> None:
        """Add one sample.

        Mutates: times_s, mib.
        """
        now = {name: 0.0 for name in self.mib}
        for process in processes(self.pid):
            with suppress(psutil.NoSuchProcess):
                name = named(process)
                now[name] = now.get(name, 0.0) + process.memory_info().rss / _MIB
        for name, held in now.items():
            self.mib.setdefault(name, [0.0] * len(self.times_s)).append(held)
        self.times_s.append(time.monotonic())

    def slope(self) -> float:
        """Return the growth of all processes together, MiB a minute, once caches are warm.

        The median of the slopes of all pairs of samples (Theil-Sen): one jump does not move it.
        """
        totals = self.total()
        first = int(len(totals) * SETTLED)
        return theil_sen(self.times_s[first:], totals[first:]) * 60

    def total(self) -> list[float]:
        """Return MiB of all processes at each time."""
        return [sum(step) for step in zip(*self.mib.values(), strict=True)]


def theil_sen(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the median slope between pairs; 0 for fewer than two points."""
    pairs = range(len(xs))
    slopes = [(ys[j] - ys[i]) / (xs[j] - xs[i]) for i in pairs for j in pairs if i < j]
    return median(slopes) if slopes else 0.0


def processes(pid: int) -> list[psutil.Process]:
    """Return a process and all below it that are alive."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def named(process: psutil.Process) -> str:
    """Return what a process is in a vLLM server."""
    title = " ".join(process.cmdline()[:1])
    return title.split("::")[1].split()[0] if "::" in title else "server"


def engines(pid: int) -> list[int]:
    """Return the process ids of the engines below a server."""
    found: list[int] = []
    for process in processes(pid):
        with suppress(psutil.NoSuchProcess):
            if ENGINE in named(process):
                found.append(process.pid)
    return found
