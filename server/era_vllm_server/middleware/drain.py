"""The end on SIGTERM: new requests are refused, accepted ones finish, then vLLM shuts down.

vLLM's own shutdown ends the renderer first, and accepted requests with it. So SIGTERM is taken
over once the application starts, which is after vLLM has set its handlers (vllm/entrypoints/
launchers/launcher.py ``serve_http``, 0.32.0), and vLLM gets a SIGINT when nothing is left. With
several API servers their parent hands the SIGTERM on to each (vllm/v1/utils.py ``shutdown``) and
waits for ``--shutdown-timeout``, which therefore has to be longer than the drain.
"""

import asyncio
import logging
import os
import signal
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config

from era_vllm.compat.starlette_path import get_route_path
from era_vllm_server.metrics import REJECTED
from era_vllm_server.middleware.auth import HEALTH, METRICS, is_preflight
from era_vllm_server.middleware.deadline import Exchange
from era_vllm_server.refusals import CLOSE, Header, Refusal

_NOTICE_S: Final = 1.0
"""At least so long new requests are told to go elsewhere, before connections are refused."""
_LAST_WORD_S: Final = 2.0
_STEP_S: Final = 0.05
_CLOSING_S: Final = 3
"""For connections that are still open when uvicorn ends."""
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Drain:
    """The layer: refuses newcomers while it drains, and says with every 503 when to come."""

    app: ASGIApp
    limit_s: float
    """How long accepted requests may go on; 0 = vLLM ends them as it does."""
    in_flight: set[Exchange]
    retry: Header
    """Says when to come again."""
    _task: asyncio.Task[None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._refusal = Refusal(
            "draining",
            "the server is shutting down; send the request again, to another one",
            HTTPStatus.SERVICE_UNAVAILABLE,
            (self.retry, CLOSE),
            close_code=1012,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_http = scope["type"] == "http"
        open_path = is_preflight(scope) or get_route_path(scope) in (HEALTH, METRICS)
        if self.draining and not (is_http and open_path):
            await self._refusal.answer(scope, send)
            return
        if is_http:
            send = partial(self._send, scope["method"], send)
        await self.app(scope, receive, send)

    async def _send(self, method: str, send: Send, message: Message) -> None:
        """Add to a response's headers, where it has none of the name."""
        if message["type"] == "http.response.start":
            headers: list[Header] = list(message.get("headers", []))
            added = [CLOSE] if self.draining else []
            if message["status"] == HTTPStatus.SERVICE_UNAVAILABLE:
                added.append(self.retry)
                if method == "POST" and self.retry[0] not in dict(headers):
                    REJECTED.labels("busy").inc()  # vLLM's admission limits, and no probe
            missing = [header for header in added if header[0] not in dict(headers)]
            message = {**message, "headers": [*headers, *missing]}
        await send(message)

    @property
    def draining(self) -> bool:
        """Whether SIGTERM has come."""
        return self._task is not None

    def take_over(self, config: Config) -> None:
        """Take SIGTERM over from vLLM; the running loop must be the main thread's.

        Mutates: config, so that a client which does not read keeps no server from its end.
        """
        if config.timeout_graceful_shutdown is None:
            config.timeout_graceful_shutdown = _CLOSING_S
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._begin)

    def _begin(self) -> None:
        if self._task is None:  # a parent's SIGTERM may follow the process group's
            self._task = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        if self.limit_s:
            await self._wait()
        os.kill(os.getpid(), signal.SIGINT)

    async def _wait(self) -> None:
        now = asyncio.get_running_loop().time
        started, accepted = now(), len(self.in_flight)
        _log.info("draining: %d requests under way, at most %g s", accepted, self.limit_s)
        while now() < started + _NOTICE_S or (self.in_flight and now() < started + self.limit_s):
            await asyncio.sleep(_STEP_S)
        late = len(self.in_flight)
        for exchange in tuple(self.in_flight):
            exchange.stop(self._refusal)
        end = now() + _LAST_WORD_S
        while self.in_flight and now() < end:
            await asyncio.sleep(_STEP_S)
        _log.info("drained in %.1f s: %d of %d cut off", now() - started, late, accepted)
