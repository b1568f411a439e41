#!/usr/bin/env python3
"""What one body can do to a server: the longest silence of /health, and memory, for each.

Starts its own server of the shipped model, asks for its OpenAPI description, and sends to every
route that takes JSON a body for every list, string and object in it that grows up to the cap.
``growth.py`` makes the bodies; ``probe.py`` watches from a process of its own.
"""

import argparse
import http.client
import json
import os
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Final

from growth import Body, bodies
from probe import Probe, Sample
from tqdm import tqdm
from watch import processes

from era_vllm.bench.provenance import provenance
from era_vllm.errors import EraError
from era_vllm.lab.servers import Server, wait_for

DESCRIPTION: Final = """Send one body at a time; report the longest gap in /health and memory.

  deploy/loadtest/bodies.py                      every route, field and element at every size
  deploy/loadtest/bodies.py --cases 300          so many of them, drawn by --seed
  deploy/loadtest/bodies.py --only /v1/responses

A gap over --gap-s (the median of three) or memory over --memory-mib is a failure: exit code 1.
Writes OUT/bodies.json and OUT/bodies.txt.
"""
_FLAGS: Final = (
    *("--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M"),
    *("--served-model-name", "m"),
)
SIZES: Final = [16_000, 50_000, 150_000, 1_000_000, 30_000_000]
"""Below each bound of a kind, beyond it, and what is refused at once."""
_LIMIT_S: Final = 60.0
_KILL_MIB: Final = 6000
_REPEAT: Final = 2
"""Further tries of a body whose gap is over the bound."""


def main() -> None:
    """Run, write the report, end with 1 where a body did too much."""
    arguments = options()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = Bench(arguments).run()
    rows.sort(key=lambda row: (row["gap_s"], row["mib"]), reverse=True)
    failed = [row for row in rows if not row["passed"]]
    report = {
        "bodies": len(rows),
        "failed": len(failed),
        "longest_gap_s": max(row["gap_s"] for row in rows),
        "most_mib": max(row["mib"] for row in rows),
        **provenance(),
        "command": " ".join(sys.argv),
        "bounds": {"gap_s": arguments.gap_s, "memory_mib": arguments.memory_mib},
        "rows": rows,
    }
    (arguments.out / "bodies.json").write_text(json.dumps(report, indent=1) + "\n")
    text = page(report)
    (arguments.out / "bodies.txt").write_text(text)
    print(text)
    sys.exit(bool(failed))


class Bench:
    """A server, what watches it, and the bodies that it is sent."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.cpus = sorted(os.sched_getaffinity(0))
        self.server: Server | None = None
        self.probe: Probe | None = None

    def run(self) -> list[dict[str, object]]:
        """Send every body; returns a row for each."""
        try:
            self._start()
            chosen = list(bodies(self._openapi(), self.arguments.sizes))
            if self.arguments.only:
                chosen = [body for body in chosen if body.path == self.arguments.only]
            if self.arguments.cases:
                draw = random.Random(self.arguments.seed).sample
                chosen = draw(chosen, min(self.arguments.cases, len(chosen)))
            return [self._row(body) for body in tqdm(chosen, desc="bodies", smoothing=0)]
        finally:
            self._stop()

    def _row(self, body: Body) -> dict[str, object]:
        bound = self.arguments
        tries = [self._try(body)]
        if tries[0].gap_s > bound.gap_s and not tries[0].ended:
            tries += [self._try(body) for _ in range(_REPEAT)]
        gap, mib = median(s.gap_s for s in tries), max(s.mib for s in tries)
        passed = gap <= bound.gap_s and mib <= bound.memory_mib and not tries[0].ended
        return {
            "path": body.path,
            "field": body.field,
            "element": body.element,
            "bytes": body.size,
            "status": tries[0].status,
            "seconds": round(tries[0].seconds, 3),
            "gap_s": round(gap, 3),
            "mib": round(mib, 1),
            "passed": passed,
        }

    def _try(self, body: Body) -> Sample:
        data = body.encode()
        assert self.probe is not None  # since _start
        with self.probe.watching() as sample:
            sample.status, sample.seconds = self._post(body.path, data)
        if sample.ended:
            self._stop()
            self._start()
        return sample

    def _post(self, path: str, data: bytes) -> tuple[str, float]:
        started = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=_LIMIT_S)
        try:
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            reply.read()
            status = str(reply.status)
        except OSError as error:  # closed in the middle of a body, ended, or too late
            status = type(error).__name__
        finally:
            connection.close()
        return status, time.monotonic() - started

    def _start(self) -> None:
        """Start the server on all cores but the first, which is ours."""
        command = [str(Path(sys.executable).with_name("era-vllm")), "serve", *_FLAGS]
        if len(self.cpus) > 1:
            rest = ",".join(map(str, self.cpus[1:]))
            command = ["taskset", "-c", rest, *command]
            os.sched_setaffinity(0, self.cpus[:1])
        variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        log = self.arguments.out / "bodies-server.log"
        self.server = Server("era-vllm serve", [*command, *self.arguments.server], variables, log)
        wait_for([self.server])
        self._post("/v1/chat/completions", json.dumps(WARM).encode())
        self.probe = Probe(self.server.port, processes(self.server.pid)[0].pid, _KILL_MIB)

    def _stop(self) -> None:
        if self.probe is not None:
            self.probe.close()
            self.probe = None
        if self.server is not None:
            self.server.stop()
            self.server = None

    def _openapi(self) -> dict[str, object]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port)
        connection.request("GET", "/openapi.json")
        return json.loads(connection.getresponse().read())


WARM: Final = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def page(report: dict[str, object]) -> str:
    """Return the report for a person: the worst bodies first."""
    rows = report["rows"]
    lines = [
        f"{report['bodies']} bodies, {report['failed']} failed; longest gap in /health "
        f"{report['longest_gap_s']:.2f} s, most memory {report['most_mib']:.0f} MiB over the base",
        f"{'gap s':>7} {'MiB':>7} {'bytes':>9} {'status':>22}  route, field, element",
    ]
    for row in rows[:40]:
        what = f"{row['path']} {row['field']} {row['element']}"
        numbers = f"{row['gap_s']:7.2f} {row['mib']:7.0f} {row['bytes']:9d} {row['status']:>22}"
        lines.append(f"{numbers}  {what}{'' if row['passed'] else '  FAILED'}")
    return "\n".join(lines) + "\n"


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, help="so many bodies (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="PATH", help="bodies of one route")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, help=f"in bytes (default {SIZES})"
    )
    parser.add_argument("--gap-s", type=float, default=0.5)
    parser.add_argument("--memory-mib", type=float, default=200)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="further flags")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except EraError as error:
        sys.exit(f"bodies: {error}")
