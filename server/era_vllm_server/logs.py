"""One JSON line a request on standard output (``--era-log-json``), in place of the access log.

    {"time": "...", "event": "request", "id": "...", "method": "POST", "route": "/v1/...",
     "status": 200, "ms": 41.2, "images": [{"level": "medium", "source": "default", ...}]}

Never what was asked or answered: no prompt, no image, no URL, no query, no key; a path that is no
route of ours is ``other``. The id is that of the answer's ``X-Request-Id`` (``replies``). The
outermost layer of all.
"""

import json
import logging
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from time import perf_counter
from typing import Final

from starlette._utils import get_route_path
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era_vllm_server.replies import named

LOGGER: Final = "era_vllm_server.requests"
IMAGES: Final = "era_images"
"""Key of ``request.state`` where a route leaves what was done with each image."""
SHOWN: Final = ("pruning_rate", "level", "source", "clamped", "tokens_before", "tokens_after")
QUIET: Final = frozenset({"/health", "/ready", "/metrics", "/ping"})
"""Asked every few seconds by machines."""
CLIENT_GONE: Final = 499
"""In place of a status where the client left before the end; nginx's number."""
_NO_RESPONSE: Final = 500
"""Of an exception, which a layer around this one answers."""


class RequestLog:
    """vLLM makes one in every API server, around everything else."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._logger = _logger()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, then write its line."""
        if scope["type"] != "http" or get_route_path(scope) in QUIET:
            await self.app(scope, receive, send)
            return
        name, scope = named(scope)
        scope["state"] = dict(scope.get("state") or {})
        started, status = perf_counter(), _NO_RESPONSE
        left = complete = False

        async def receiving() -> Message:
            nonlocal left
            message = await receive()
            left |= message["type"] == "http.disconnect" and not complete
            return message

        async def sending(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receiving, sending)
        finally:
            self._logger.info(
                "request",
                extra={
                    "fields": {
                        "id": name.decode(),
                        "method": scope["method"],
                        "route": _route(scope),
                        "status": CLIENT_GONE if left else status,
                        "ms": round((perf_counter() - started) * 1e3, 1),
                        "images": [
                            {key: image[key] for key in SHOWN}
                            for image in scope["state"].get(IMAGES, ())
                        ],
                    }
                },
            )


class JsonLine(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return time, event and the record's fields."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, object] = getattr(record, "fields", {})
        return json.dumps({"time": time, "event": record.getMessage(), **fields})


def _logger() -> logging.Logger:
    logger = logging.getLogger(LOGGER)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(JsonLine())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


def _route(scope: Scope) -> str:
    """Return the path of the application's own route, which holds nothing of a client's."""
    return _path(getattr(scope.get("app"), "routes", ()), scope) or "other"


def _path(routes: Iterable[BaseRoute], scope: Scope) -> str | None:
    """Return the path of the first route that takes a request.

    From FastAPI 0.137 on a router that was included stands among the routes itself, without a path;
    its own routes, with the prefixes of all routers around them, are its candidates.
    """
    for route in routes:
        if route.matches(scope)[0] == Match.NONE:
            continue
        if path := getattr(route, "path", None):
            return path
        return _path(getattr(route, "effective_candidates", list)(), scope)
    return None
