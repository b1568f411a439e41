"""The outermost ASGI layer (``--middleware``): every request passes it first.

In this order: draining, key, size of the body, then the application under a deadline. Paths are
those of the ASGI scope, which the router uses too, never what the Host header makes of them
(CVE-2026-48746). Leaves out pictures (``media``) and pruning rates (``rates``).
"""

import asyncio
from http import HTTPStatus
from typing import Final

from starlette._utils import get_route_path  # what the router strips, by the router's rule
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from era_vllm.errors import ConfigError
from era_vllm_server.drain import Drain
from era_vllm_server.exchange import Exchange, Header, Refusal
from era_vllm_server.keys import Keys, as_bearer, presented
from era_vllm_server.metrics import REJECTED
from era_vllm_server.settings import ServerSettings, refuse_unknown_variables

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
    """vLLM makes one in every API server, around everything else.

    Raises:
        ConfigError: a setting or a keys file that cannot be used; the server does not start.
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
        self.keys = _keys(settings, app)
        file = settings.metrics_key_file
        self.metrics_keys = self.keys if file is None else Keys.read(file)
        if settings.allow_image_uuid and not self.keys:
            raise ConfigError(
                "--era-allow-image-uuid: pictures' names are kept apart by API key, and there is "
                "none; set --era-api-keys-file, or leave it out"
            )
        self.drain = Drain(settings.drain_timeout_s, self._draining)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the lifespan."""
        if scope["type"] == "lifespan":
            self.drain.take_over()
            state = scope["app"].state  # vLLM takes it from the app when the lifespan ends
            await self.app(scope, receive, send)
            _note_end(state, asked=self.drain.draining)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # a websocket; closed before it is accepted it is a 403
            scope, refusal = self._admit(scope)
            if refusal is None:
                await self.app(scope, receive, send)
            else:
                REJECTED.labels(refusal.reason).inc()
                await send({"type": "websocket.close", "code": 1008, "reason": refusal.reason})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope, refusal = self._admit(scope)
        if refusal is None and _announced(scope) > self.settings.max_body_bytes:
            refusal = self._too_large
        if refusal is not None:
            await refusal.answer(send)
            return
        max_body = self.settings.max_body_bytes, self._too_large
        exchange = Exchange(receive, send, max_body, self._added)
        late = None
        if self.settings.request_timeout_s:
            delay = self.settings.request_timeout_s
            late = asyncio.get_running_loop().call_later(delay, exchange.stop, self._too_late)
        self.drain.in_flight.add(exchange)
        try:
            await exchange.run(self.app, scope)
        finally:
            self.drain.in_flight.discard(exchange)
            if late is not None:
                late.cancel()

    def _admit(self, scope: Scope) -> tuple[Scope, Refusal | None]:
        """Return the request as the application is to see it, and why it is refused, if it is."""
        path = get_route_path(scope)
        if self.drain.draining and path not in (HEALTH, METRICS):
            return scope, self._draining
        if path in OPEN or path.startswith(OPEN_FOLDER) or _is_preflight(scope):
            return scope, None
        # all that begins so: vLLM mounts its metrics at /metrics{anything}, for every method
        keys = self.metrics_keys if path.startswith(METRICS) else self.keys
        if not keys:
            return scope, None
        key = keys.holder(presented(scope))
        return (scope, self._no_key) if key is None else (as_bearer(scope, key), None)

    def _added(self, status: int) -> list[Header]:
        """Return headers for the application's own responses."""
        headers = [_CLOSE] if self.drain.draining else []
        if status == HTTPStatus.SERVICE_UNAVAILABLE:  # vLLM's admission limits
            REJECTED.labels("busy").inc()
            headers.append(self._retry)
        return headers


def _keys(settings: ServerSettings, app: ASGIApp) -> Keys:
    """Return the keys of our file, or else vLLM's own, which it asks for under /v1 and /v2 only.

    Upstream: vllm/entrypoints/serve/middleware/authenticate.py, one of the layers around ``app``;
    it keeps SHA-256 digests of ``--api-key`` or ``VLLM_API_KEY``, wherever they came from.
    """
    theirs, layer = list[bytes](), app
    while layer is not None:
        theirs += getattr(layer, "api_tokens", [])
        layer = getattr(layer, "app", None)
    if settings.api_keys_file is None:
        return Keys(tuple(theirs))
    if theirs:
        raise ConfigError(
            "keys come from --era-api-keys-file and from vLLM's --api-key or VLLM_API_KEY, needed "
            "one of the two; write them all into the file"
        )
    return Keys.read(settings.api_keys_file)


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
