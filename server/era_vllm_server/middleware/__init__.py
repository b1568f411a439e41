"""READ FIRST of what stands before the application (``--middleware``): the layers, outermost first.

    log        names each request, counts what it was told, writes its line
    errors     an error in the form of its API, and not too long
    cors       our own refusals, for browsers
    drain      no newcomers after SIGTERM
    auth       API keys
    deadline   an end to the work
    limits     bytes of a body, and of all
    body       what stands in it (inside of vLLM's own layers; ``routes`` adds it)

Each is an ASGI layer of its own. Paths are those of the ASGI scope, which the router uses too,
never what the Host header makes of them (CVE-2026-48746).
"""

import logging
from functools import partial

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from era_vllm.compat.fastapi_fields import stop_at_first_error
from era_vllm.compat.starlette_path import flat_routes
from era_vllm.compat.uvicorn_h11 import use_bounded_h11
from era_vllm.compat.versions import check_server_versions
from era_vllm_server.keys import Keys, keys_of
from era_vllm_server.metrics import REJECTED, RESPONSES
from era_vllm_server.middleware.auth import Auth
from era_vllm_server.middleware.cors import Cors, layers
from era_vllm_server.middleware.deadline import Deadline
from era_vllm_server.middleware.drain import Drain
from era_vllm_server.middleware.errors import ErrorForm
from era_vllm_server.middleware.limits import BodyLimits
from era_vllm_server.middleware.log import RequestLog
from era_vllm_server.refusals import Header
from era_vllm_server.settings import ServerSettings, refuse_unknown_variables

_log = logging.getLogger(__name__)


class Front:
    """vLLM makes one in every API server, around everything else, when uvicorn starts.

    An error is told as ASGI's ``lifespan.startup.failed``, on which the server ends: one that is
    raised uvicorn takes for an application without a lifespan, and serves.
    """

    def __init__(self, app: ASGIApp) -> None:
        try:
            self.app: ASGIApp = Stack(app)
        except Exception as error:
            self.app = partial(_fail, f"{type(error).__name__}: {error}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class Stack:
    """The layers between clients and the application.

    Raises:
        ConfigError: a setting or a keys file that cannot be used.
        UnsupportedError: a package of vLLM's server of a version that was not tested.
    """

    def __init__(self, app: ASGIApp) -> None:
        check_server_versions()
        refuse_unknown_variables()
        settings = ServerSettings.parse()
        retry: Header = (b"retry-after", str(settings.retry_after_s).encode())
        keys, metrics_keys = keys_of(settings, _keys_of_vllm(app))
        limits = BodyLimits(app, settings.max_body_bytes, settings.max_bodies_bytes, retry)
        deadline = Deadline(limits, settings.request_timeout_s)
        auth = Auth(deadline, keys, metrics_keys)
        self.drain = Drain(auth, settings.drain_timeout_s, deadline.in_flight, retry)
        self._lifespan = app
        self._http = RequestLog(ErrorForm(Cors(self.drain, app)), lines=settings.log_json)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._http(scope, receive, send)
            return
        state = scope["app"].state  # vLLM takes it from the app when the lifespan ends
        try:
            config, routes = state.server.config, flat_routes(scope["app"].routes)
            websockets = any(isinstance(route, WebSocketRoute) for route in routes)
            use_bounded_h11(config, _count, websockets=websockets)
            stop_at_first_error(scope["app"])
            self.drain.take_over(config)
        except Exception as error:  # without drain and bounds nothing is served
            await _fail(f"{type(error).__name__}: {error}", scope, receive, send)
            return
        _describe(scope["app"])
        await self._lifespan(scope, receive, send)
        _note_end(state, by_signal=self.drain.draining)


async def _fail(message: str, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer the lifespan, after which uvicorn ends; nothing else is sent to it."""
    await send({"type": "lifespan.startup.failed", "message": message})


def _describe(app: FastAPI) -> None:
    """Make /openapi.json now, not while others wait: it takes a second, and no key."""
    if app.openapi_url:
        try:
            app.openapi()
        except Exception:  # of some model of vLLM's: the route says so, and all others are served
            _log.exception("the description of the routes (%s) cannot be made", app.openapi_url)


def _count(status: int, reason: str) -> None:
    """Count what was refused before any layer; status 0 = in the midst of an answer."""
    REJECTED.labels(reason).inc()
    if status:
        RESPONSES.labels(str(int(status))).inc()


def _keys_of_vllm(app: ASGIApp) -> Keys:
    """Return vLLM's own keys, which it asks for under /v1 and /v2 only.

    Upstream: vllm/entrypoints/serve/middleware/authenticate.py, one of the layers around ``app``;
    it keeps SHA-256 digests of ``--api-key`` or ``VLLM_API_KEY``, wherever they came from.
    """
    return Keys(key for layer in layers(app) for key in getattr(layer, "api_tokens", []))


def _note_end(state: State, *, by_signal: bool) -> None:
    """Leave for ``app.run``, beside vLLM's arguments, whether the engine ended by itself.

    vLLM's server ends with 0 then. After an interrupt it cannot be told from an end of its own.
    """
    state.args.era_engine_failed = not by_signal and state.engine_client.errored
