"""The outermost ASGI layer (``--middleware``): every request passes it first, and is counted.

In this order: draining, key, size of the body, then the application under a deadline. Paths are
those of the ASGI scope, which the router uses too, never what the Host header makes of them
(CVE-2026-48746). Leaves out pictures (``media``) and pruning rates (``rates``).
"""

import asyncio
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from typing import Final

from starlette._utils import get_route_path  # what the router strips, by the router's rule
from starlette.datastructures import Headers, State
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn import Config
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from era_vllm_server.drain import Drain
from era_vllm_server.exchange import Exchange, Header, Refusal
from era_vllm_server.keys import Keys, as_bearer, keys_of, presented
from era_vllm_server.logs import QUIET
from era_vllm_server.metrics import REJECTED, RESPONSES
from era_vllm_server.replies import Reply
from era_vllm_server.settings import ServerSettings, refuse_unknown_variables
from era_vllm_server.wire import bound

READY: Final = "/ready"
HEALTH: Final = "/health"
METRICS: Final = "/metrics"
OPEN: Final = frozenset(
    {HEALTH, READY, "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
)
"""Paths that ask for no key: probes, and pages that say the same to everybody."""
OPEN_FOLDER: Final = "/static/"
_CLOSE: Final[Header] = (b"connection", b"close")


class Guard:
    """vLLM makes one in every API server, around everything else, when uvicorn starts.

    An error is told as ASGI's ``lifespan.startup.failed``, on which the server ends: one that is
    raised uvicorn takes for an application without a lifespan, and serves.
    """

    def __init__(self, app: ASGIApp) -> None:
        try:
            self._gate: ASGIApp = Gate(app)
        except Exception as error:
            self._gate = partial(_fail, f"{type(error).__name__}: {error}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the lifespan."""
        await self._gate(scope, receive, send)


class Gate:
    """What stands between clients and the application.

    Raises:
        ConfigError: a setting or a keys file that cannot be used.
    """

    def __init__(self, app: ASGIApp) -> None:
        refuse_unknown_variables()
        self.app = app
        self.settings = settings = ServerSettings.parse()
        retry: Header = (b"retry-after", str(settings.retry_after_s).encode())
        self._retry = retry
        self._draining = Refusal(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "draining",
            "the server is shutting down; send the request again, to another one",
            (retry, _CLOSE),
        )
        self._no_key = Refusal(
            HTTPStatus.UNAUTHORIZED,
            "key",
            "a key is needed and none that is known was given; send it as 'Authorization: Bearer "
            "KEY' or 'x-api-key: KEY'",
            ((b"www-authenticate", b"Bearer"),),
        )
        self._too_large = Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "body_size",
            f"the request's body is longer than {settings.max_body_bytes} bytes",
            (_CLOSE,),  # the rest of it is not read
        )
        self._too_late = Refusal(
            HTTPStatus.GATEWAY_TIMEOUT,
            "deadline",
            f"the request took longer than {settings.request_timeout_s:g} s and was ended",
            (_CLOSE,),
        )
        self.keys, self.metrics_keys = keys_of(settings, _vllms_keys(app))
        self._cors = next((at for at in _layers(app) if isinstance(at, CORSMiddleware)), None)
        self._background = set[asyncio.Task[None]]()
        self.drain = Drain(settings.drain_timeout_s, self._draining)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the lifespan."""
        if scope["type"] == "lifespan":
            state = scope["app"].state  # vLLM takes it from the app when the lifespan ends
            try:
                config: Config = state.server.config
                bound(config)
                self.drain.take_over(config)
            except Exception as error:  # without drain and bounds nothing is served
                await _fail(f"{type(error).__name__}: {error}", scope, receive, send)
                return
            await self.app(scope, receive, send)
            _note_end(state, asked=self.drain.draining)
        elif scope["type"] == "http":
            status: int = HTTPStatus.INTERNAL_SERVER_ERROR
            reply = Reply(scope, send)
            try:
                status = await self._http(reply.scope, receive, reply)
            except Exception as error:  # starlette's answer to it would pass beside ``reply``
                if not reply.started:
                    said = create_error_response(error).model_dump()
                    await JSONResponse(said, status)(scope, receive, reply)
                raise
            finally:
                if get_route_path(scope) not in QUIET:
                    RESPONSES.labels(str(int(status))).inc()
        else:  # a websocket; closed before it is accepted it is a 403
            scope, refusal = self._admit(scope)
            if refusal is None:
                await self.app(scope, receive, send)
            else:
                REJECTED.labels(refusal.reason).inc()
                await send({"type": "websocket.close", "code": 1008, "reason": refusal.reason})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Answer a request; return the status."""
        send_own = self._with_cors(scope, send)
        scope, refusal = self._admit(scope)
        if refusal is None and _announced(scope) > self.settings.max_body_bytes:
            refusal = self._too_large
        if refusal is not None:
            await refusal.answer(send_own)
            return refusal.status
        max_body = self.settings.max_body_bytes, self._too_large
        added = partial(self._added, scope["method"])
        exchange = Exchange(receive, send, send_own, max_body, added)
        late = None
        if self.settings.request_timeout_s:
            delay = self.settings.request_timeout_s
            late = asyncio.get_running_loop().call_later(delay, exchange.stop, self._too_late)
        self.drain.in_flight.add(exchange)
        try:
            return await exchange.run(self.app, scope, self._background)
        finally:
            self.drain.in_flight.discard(exchange)
            if late is not None:
                late.cancel()

    def _admit(self, scope: Scope) -> tuple[Scope, Refusal | None]:
        """Return the request as the application is to see it, and why it is refused, if it is."""
        path = get_route_path(scope)
        if _is_preflight(scope):
            return scope, None
        if self.drain.draining and path not in (HEALTH, METRICS):
            return scope, self._draining
        reading = scope.get("method", "GET") in ("GET", "HEAD")  # a websocket has none
        if reading and (path in OPEN or path.startswith(OPEN_FOLDER)):
            probed = path in (HEALTH, READY)  # by some load balancers with HEAD, which has no route
            return {**scope, "method": "GET"} if probed else scope, None
        # all that begins so: vLLM mounts its metrics at /metrics{anything}, for every method
        keys = self.metrics_keys if path.startswith(METRICS) else self.keys
        if not keys:
            return scope, None
        key = keys.holder(presented(scope))
        return (scope, self._no_key) if key is None else (as_bearer(scope, key), None)

    def _added(self, method: str, status: int) -> list[Header]:
        """Return headers for the application's own responses."""
        headers = [_CLOSE] if self.drain.draining else []
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append(self._retry)
            if method == "POST":  # vLLM's admission limits, and no probe
                REJECTED.labels("busy").inc()
        return headers

    def _with_cors(self, scope: Scope, send: Send) -> Send:
        """Return what sends our own answers to browsers as vLLM's CORS layer sends the others.

        It is inside of us. Without its headers a script sees a network error, and no status.
        """
        headers = Headers(scope=scope)
        if self._cors is None or "origin" not in headers:
            return send
        return partial(self._cors.send, send=send, request_headers=headers)


async def _fail(message: str, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer the lifespan, after which uvicorn ends; nothing else is asked."""
    await send({"type": "lifespan.startup.failed", "message": message})


def _layers(app: ASGIApp) -> Iterator[object]:
    """Yield an application's layers, the outermost first."""
    layer: object = app
    while layer is not None:
        yield layer
        layer = getattr(layer, "app", None)


def _vllms_keys(app: ASGIApp) -> Keys:
    """Return vLLM's own keys, which it asks for under /v1 and /v2 only.

    Upstream: vllm/entrypoints/serve/middleware/authenticate.py, one of the layers around ``app``;
    it keeps SHA-256 digests of ``--api-key`` or ``VLLM_API_KEY``, wherever they came from.
    """
    theirs = [key for layer in _layers(app) for key in getattr(layer, "api_tokens", [])]
    return Keys(tuple(theirs))


def _note_end(state: State, *, asked: bool) -> None:
    """Leave for ``app.run``, beside vLLM's arguments, whether the engine ended by itself.

    vLLM's server ends with 0 then. After an interrupt it cannot be told from an end of its own.
    """
    state.args.era_engine_failed = not asked and state.engine_client.errored


def _is_preflight(scope: Scope) -> bool:
    """Tell whether vLLM's CORS layer, which is inside of this one, answers a request by itself."""
    asked = {b"origin", b"access-control-request-method"}
    return scope.get("method") == "OPTIONS" and asked <= {name for name, _ in scope["headers"]}


def _announced(scope: Scope) -> int:
    """Return the body's length by its header; 0 where that does not say, the body is counted."""
    values = [value for name, value in scope["headers"] if name == b"content-length"]
    return max([int(value[:20]) for value in values if value.isdigit()], default=0)
