"""Our routes on vLLM's app (its endpoint plugin hook), and what they need of the engine.

Nothing is attached to a server whose ``--additional-config`` has no ``era``: that one is stock.
"""

import asyncio
import logging
from argparse import Namespace
from time import perf_counter
from typing import Final

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from era_vllm.config import EraConfig
from era_vllm_server import info, inspect, metrics, probe, ready, routes
from era_vllm_server import media as media  # registers the connector
from era_vllm_server.metrics import WorkerMetrics
from era_vllm_server.retry import retry_missed_pictures
from era_vllm_server.settings import ServerSettings

logger = logging.getLogger(__name__)


class EraEndpoints:
    """Entry point ``vllm.endpoint_plugins``; vLLM makes one in every API server."""

    name: Final = "era"
    required_tasks: Final = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes, which replace vLLM's of the same path and method."""
        raw = _era(app.state.args)
        if raw is None:
            return
        _log_with_vllm()
        app.state.era_config = EraConfig.parse(raw)
        app.state.era_settings = ServerSettings.parse()
        for module in (info, inspect, metrics, ready):
            app.include_router(module.router)
        routes.attach(app)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Send a first request through the engine; the socket is not served before."""
        if engine_client is None or _era(args) is None:
            return
        config: EraConfig = state.era_config
        retry_missed_pictures(engine_client)
        if probe.workers_answer(engine_client):
            state.era_worker_metrics = WorkerMetrics(engine_client)
        state.era_inspecting = asyncio.Lock()
        state.era_pulse = ready.Pulse(engine_client)
        state.era_identity = await asyncio.to_thread(info.identity, args, config)
        started = perf_counter()
        await ready.warm_up(engine_client, config)
        state.era_warm = True
        logger.info("ready: warmed by one request in %.2f s", perf_counter() - started)


def _era(args: Namespace) -> dict[str, object] | None:
    raw = args.additional_config
    return raw.get("era") if isinstance(raw, dict) else None


def _log_with_vllm() -> None:
    """Have our log lines go where vLLM's go, in its form."""
    ours, theirs = logging.getLogger("era_vllm_server"), logging.getLogger("vllm")
    ours.setLevel(theirs.level)
    ours.handlers = theirs.handlers
