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
from typing import Final

from uvicorn import Config

from era_vllm_server.exchange import Exchange, Refusal

_NOTICE_S: Final = 1.0
"""At least so long new requests are told to go elsewhere, before connections are refused."""
_LAST_WORD_S: Final = 2.0
_STEP_S: Final = 0.05
_CLOSING_S: Final = 3
"""For connections that are still open when uvicorn ends."""
_log = logging.getLogger(__name__)


class Drain:
    """Knows which requests are under way, and whether new ones are still taken."""

    def __init__(self, limit_s: float, refusal: Refusal) -> None:
        """Make one that does nothing yet.

        Args:
            limit_s: How long accepted requests may go on; 0 = vLLM ends them as it does.
            refusal: What those are told that take longer.
        """
        self.limit_s = limit_s
        self.refusal = refusal
        self.in_flight = set[Exchange]()
        self._task: asyncio.Task[None] | None = None

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
            exchange.stop(self.refusal)
        end = now() + _LAST_WORD_S
        while self.in_flight and now() < end:
            await asyncio.sleep(_STEP_S)
        _log.info("drained in %.1f s: %d of %d cut off", now() - started, late, accepted)
