#!/usr/bin/env python3
"""READ FIRST of the soak: a server under more load than it can carry, then without its engine.

Its parts: ``traffic.py`` (what is sent), ``watch.py`` (processes and memory), ``kill.py`` (without
its engine) and ``verdict.py``. Starts its own server, of the shipped model unless told otherwise,
in float32: bf16 on a CPU decides near ties by the batch a request is in, which is no fault and
would look like one. A model that takes videos is sent some.
"""

import argparse
import asyncio
import json
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import httpx
from kill import kill_engine
from traffic import Ask, Outcome, broken_asks, draw, good_asks, reference, send
from verdict import Judgement, judge, page
from watch import Watch, engines

from era_vllm.bench.provenance import provenance
from era_vllm.errors import EraError
from era_vllm.lab.screen import progress
from era_vllm.lab.servers import Server, wait_for

DESCRIPTION: Final = """Load a server beyond its capacity, and judge it.

  deploy/loadtest/soak.py                    the shipped model, ten minutes
  deploy/loadtest/soak.py --seconds 60       a quick one
  deploy/loadtest/soak.py --model FOLDER     another small model, with videos where it takes them

1. Answers at temperature 0 to all questions, one at a time: what is right from here on.
2. Capacity: as many requests a second as a closed loop gets answered.
3. 1.5 times that, at random moments: levels, text, two pictures, streams; some clients leave, some
   pictures are broken. No answer may be wrong, none lost; what is too much gets a 503.
4. kill -9 of the engine with requests under way: every client gets an error, the server ends.

Writes OUT/soak.json and OUT/soak.txt; exit code 1 if a check failed.
"""
_ERA_VLLM: Final = str(Path(sys.executable).with_name("era-vllm"))
_FLAGS: Final = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"),
    *("--max-num-seqs", "8", "--max-num-queued-reqs", "24"),
    # small caches: they fill soon, and then throw out and take in all the time
    *("--kv-cache-memory-bytes", "32M", "--mm-processor-cache-gb", "0.03"),
    *("--served-model-name", "soak"),
)
_CLOSED_LOOP: Final = 16
_MARGIN: Final = 1e-3  # nats; float32 sums in another order differ by 1e-5
_SAMPLE_EVERY_S: Final = 2.0


def main() -> None:
    """Read the options, run, write the report."""
    arguments = options()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "soak-server.log"
    model = [] if arguments.model is None else [str(arguments.model)]
    command = [_ERA_VLLM, "serve", *model, *_FLAGS, *shlex.split(arguments.server)]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    judgement = Judgement()
    with Server("era-vllm serve", command, environment, log) as server:
        wait_for([server])
        asyncio.run(soak(server, arguments, judgement))
    report = {
        "soak": judgement.passed,
        **provenance(),
        "command": shlex.join(sys.argv),
        "server": shlex.join(["era-vllm", *command[1:]]),
        "checks": judgement.checks,
        **judgement.facts,
    }
    (arguments.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    text = page(report)
    (arguments.out / "soak.txt").write_text(text)
    print(text, end="")
    sys.exit(not judgement.passed)


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seconds", type=float, default=600, help="of overload (default: %(default)g)")
    add("--overload", type=float, default=1.5, help="times capacity (default: %(default)g)")
    add("--broken", type=float, default=0.05, help="share of requests (default: %(default)g)")
    add("--leaving", type=float, default=0.05, help="share of clients (default: %(default)g)")
    add("--asks", type=int, default=240, help="different requests (default: %(default)d)")
    add("--output-tokens", type=int, default=12)
    add("--limit-s", type=float, default=60, help="when a request counts as lost")
    add(
        "--memory",
        type=float,
        default=100,
        metavar="KIB",
        help="allowed growth a request; one picture's pixels are 331 (default: %(default)g)",
    )
    add("--seed", type=int, default=0)
    add("--model", type=Path, help="folder of a checkpoint (default: the shipped one)")
    add("--server", default="", metavar="FLAGS", help="more of `era-vllm serve`, as one word")
    add("--out", type=Path, default=Path("out"))
    return parser.parse_args()


async def soak(server: Server, arguments: argparse.Namespace, judgement: Judgement) -> None:
    """Run all phases."""
    pid = server.pid
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(
        base_url=server.url, timeout=None, trust_env=False, limits=limits
    ) as client:
        good, broken = await _prepare(client, arguments, judgement)
        first = engines(pid)
        watch = Watch(pid)
        watching = asyncio.create_task(watch.sample_forever(_SAMPLE_EVERY_S))
        capacity = await _capacity(client, good, arguments)
        judgement.facts["capacity_rps"] = capacity
        progress(f"capacity: {capacity:.1f} requests a second")
        outcomes = await _overload(client, good, broken, capacity, arguments, judgement)
        judge(outcomes, watch, arguments.memory, judgement)
        judgement.check("nothing goes on in the engine afterwards", *await _idle(client))
        judgement.check("the engine was never restarted", engines(pid), engines(pid) == first)
        ready = (await client.get("/ready")).status_code
        judgement.check("/ready afterwards", ready, ready == 200)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await kill_engine(client, server, good, arguments.limit_s, judgement)


async def _prepare(
    client: httpx.AsyncClient, arguments: argparse.Namespace, judgement: Judgement
) -> tuple[list[Ask], list[Ask]]:
    """Learn the right answers; near ties are left out."""
    progress(f"the right answers to {arguments.asks} requests, one at a time")
    modalities = (await client.get("/v1/era")).json()["modalities"]
    asks = good_asks("soak", arguments.asks, arguments.output_tokens, modalities)
    asked = [await reference(client, ask) for ask in asks]
    clear = [ask for ask in asked if ask.answer is not None and ask.answer.margin > _MARGIN]
    judgement.facts["requests"] = {
        "modalities": modalities,
        "different": len(clear),
        "near ties left out": arguments.asks - len(clear),
    }
    broken = broken_asks("soak", modalities)
    outcomes = [await send(client, ask, False, None, arguments.limit_s) for ask in broken]
    refused = all(outcome.ended == "refused" for outcome in outcomes)
    wrong = [
        f"{outcome.name}: {outcome.said}" for outcome in outcomes if outcome.ended != "refused"
    ]
    judgement.check("each kind of broken request gets a 4xx", wrong or len(broken), refused)
    return clear, broken


async def _capacity(
    client: httpx.AsyncClient, good: Sequence[Ask], arguments: argparse.Namespace
) -> float:
    """Return requests a second that a closed loop gets answered."""
    seconds = max(10.0, arguments.seconds / 10)
    lots = random.Random(arguments.seed)
    end = time.monotonic() + seconds
    answered = 0

    async def user() -> None:
        nonlocal answered
        while time.monotonic() < end:
            outcome = await send(client, lots.choice(good), True, None, arguments.limit_s)
            answered += outcome.ended in ("right", "wrong") and time.monotonic() < end

    await asyncio.gather(*(user() for _ in range(_CLOSED_LOOP)))
    return answered / seconds


async def _overload(
    client: httpx.AsyncClient,
    good: Sequence[Ask],
    broken: Sequence[Ask],
    capacity: float,
    arguments: argparse.Namespace,
    judgement: Judgement,
) -> list[Outcome]:
    """Send at random moments, whatever is still under way; return all ends."""
    lots = random.Random(arguments.seed + 1)
    rate = arguments.overload * capacity
    progress(f"{rate:.1f} requests a second for {arguments.seconds:.0f} s")
    started = time.monotonic()
    at = said = started
    tasks: list[asyncio.Task[Outcome]] = []
    while at < started + arguments.seconds:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        ask = draw(lots, good, broken, arguments.broken)
        leaving = lots.random() < arguments.leaving
        leave_after_s = lots.uniform(0.01, 2.0) if leaving else None
        stream = lots.random() < 0.5
        tasks.append(
            asyncio.create_task(send(client, ask, stream, leave_after_s, arguments.limit_s))
        )
        at += lots.expovariate(rate)
        if at > said + 30:
            said = at
            ends = Counter(task.result().ended for task in tasks if task.done())
            progress(f"{at - started:4.0f} s: {dict(ends)}")
    sent_s = time.monotonic() - started
    done, hung = await asyncio.wait(tasks, timeout=arguments.limit_s + 10)
    for task in hung:
        task.cancel()
    outcomes = [task.result() for task in done] + [Outcome("hung", "lost")] * len(hung)
    ends = Counter(outcome.ended for outcome in outcomes)
    judgement.facts["load"] = {
        "asked_rps": rate,
        "sent": len(tasks),
        "sent_rps": len(tasks) / sent_s,
        "seconds": sent_s,
        "answered_rps": ends["right"] / sent_s,
        "ends": dict(ends),
    }
    return outcomes


async def _idle(client: httpx.AsyncClient) -> tuple[object, bool]:
    """Return the engine's running and waiting requests, once 0 or after ten seconds."""
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    counts: dict[str, float] = {}
    for _ in range(20):
        lines = (await client.get("/metrics")).text.splitlines()
        counts = {
            line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith(names)
        }
        if len(counts) == len(names) and not any(counts.values()):
            return counts, True
        await asyncio.sleep(0.5)
    return counts, False


if __name__ == "__main__":
    try:
        main()
    except EraError as error:
        sys.exit(f"soak: {error}")
