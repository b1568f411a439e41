"""Which path asks for which key. Leaves out which keys there are (``keys``)."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from era_vllm.compat.starlette_path import get_route_path
from era_vllm_server.keys import Keys, as_bearer, presented
from era_vllm_server.refusals import Refusal

READY: Final = "/ready"
HEALTH: Final = "/health"
METRICS: Final = "/metrics"
OPEN: Final = frozenset(
    {HEALTH, READY, "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
)
"""Paths that ask for no key: probes, and pages that say the same to everybody."""
OPEN_FOLDER: Final = "/static/"
_NO_KEY: Final = Refusal(
    "key",
    "a key is needed and none that is known was given; send it as 'Authorization: Bearer KEY' or "
    "'x-api-key: KEY'",
    HTTPStatus.UNAUTHORIZED,
    ((b"www-authenticate", b"Bearer"),),
)


@dataclass(frozen=True, slots=True)
class Auth:
    """The layer: asks for a key on every path but the open ones, websockets too."""

    app: ASGIApp
    keys: Keys
    metrics_keys: Keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = get_route_path(scope)
        reading = scope.get("method", "GET") in ("GET", "HEAD")  # a websocket has none
        if is_preflight(scope):
            pass
        elif reading and (path in OPEN or path.startswith(OPEN_FOLDER)):
            if path in (HEALTH, READY):  # by some load balancers with HEAD, which has no route
                scope = {**scope, "method": "GET"}
        # all that begins so: vLLM mounts its metrics at /metrics{anything}, for every method
        elif keys := self.metrics_keys if path.startswith(METRICS) else self.keys:
            key = keys.holder(presented(scope))
            if key is None:
                await _NO_KEY.answer(scope, send)
                return
            scope = as_bearer(scope, key)
        await self.app(scope, receive, send)


def is_preflight(scope: Scope) -> bool:
    """Tell whether vLLM's CORS layer, which is inside of this one, answers a request by itself."""
    needed = {b"origin", b"access-control-request-method"}
    return scope.get("method") == "OPTIONS" and needed <= {name for name, _ in scope["headers"]}
