"""Our routes on vLLM's app (its endpoint plugin hook), and what they need of the engine.

Nothing is attached to a server whose ``--additional-config`` has no ``era``: that one is stock.
"""

from argparse import Namespace
from typing import Final

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from era_vllm.config import EraConfig
from era_vllm_server import media  # noqa: F401  # registers the connector
from era_vllm_server.settings import ServerSettings

ROUTERS: Final = ()
"""FastAPI routers of ours, one a file."""


class EraEndpoints:
    """Entry point ``vllm.endpoint_plugins``; vLLM makes one in every API server."""

    name: Final = "era"
    required_tasks: Final = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes, which replace vLLM's of the same path and method."""
        raw = _era(app.state.args)
        if raw is None:
            return
        app.state.era_config = EraConfig.parse(raw)
        app.state.era_settings = ServerSettings.parse()
        for router in ROUTERS:
            app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Prepare what needs the engine, before the socket is served."""


def _era(args: Namespace) -> dict[str, object] | None:
    raw = args.additional_config
    return raw.get("era") if isinstance(raw, dict) else None
