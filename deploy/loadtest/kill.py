"""The last part of a soak: the engine is killed while requests are under way."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import httpx
from traffic import PATH, Ask, events
from verdict import Judgement
from watch import engines

from era_vllm.lab.screen import progress
from era_vllm.lab.servers import Server

_STREAMS: Final = 12
_TOKENS: Final = 800


async def kill_engine(
    client: httpx.AsyncClient,
    server: Server,
    good: Sequence[Ask],
    limit_s: float,
    judgement: Judgement,
) -> None:
    """End the engine without a warning while long answers are under way."""
    (engine,) = engines(server.pid)
    progress(f"kill -9 of the engine with {_STREAMS} requests under way")
    bodies = [{**ask.body, "max_tokens": _TOKENS} for ask in good[:_STREAMS]]
    hows: list[Callable[..., Awaitable[str]]] = [_long_whole, _long_stream]
    tasks = [
        asyncio.create_task(hows[index % 2](client, body)) for index, body in enumerate(bodies)
    ]
    await asyncio.sleep(2)
    early = sum(task.done() for task in tasks)
    os.kill(engine, signal.SIGKILL)
    killed = time.monotonic()
    done, hung = await asyncio.wait(tasks, timeout=limit_s)
    seconds = time.monotonic() - killed
    for task in hung:
        task.cancel()
    ends = [task.result() for task in done]
    judgement.check("under way when the engine was killed", len(tasks) - early, early == 0)
    judgement.check(
        f"each of their clients got an error ({seconds:.1f} s)",
        dict(Counter(ends)) | ({"hung": len(hung)} if hung else {}),
        not hung and "answered" not in ends,
    )
    code = await asyncio.to_thread(server.wait, limit_s)
    judgement.facts["kill"] = {
        "clients_s": seconds,
        "server_s": time.monotonic() - killed,
        "exit_code": code,
    }
    judgement.check("the server ended by itself, not with 0", code, code not in (None, 0))


async def _long_whole(client: httpx.AsyncClient, body: dict[str, object]) -> str:
    try:
        reply = await client.post(PATH, json=body)
    except httpx.HTTPError as error:
        return type(error).__name__
    return "answered" if reply.status_code == 200 else f"status {reply.status_code}"


async def _long_stream(client: httpx.AsyncClient, body: dict[str, object]) -> str:
    try:
        async with client.stream("POST", PATH, json={**body, "stream": True}) as reply:
            if reply.status_code != 200:
                return f"status {reply.status_code}"
            async for data in events(reply):
                if "error" in data:
                    return "error in the stream"
                if any(choice.get("finish_reason") for choice in data["choices"]):
                    return "answered"
    except httpx.HTTPError as error:
        return type(error).__name__
    return "stream cut"
