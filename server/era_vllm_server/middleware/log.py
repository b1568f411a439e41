"""Names each request and counts what it was told; with ``--era-log-json`` one JSON line of each on
standard output, in place of the access log.

    {"time": "...", "event": "request", "id": "...", "method": "POST", "route": "/v1/...",
     "status": 200, "ms": 41.2, "images": [{"level": "medium", "source": "default", ...}]}

Never what was asked or answered: no prompt, no image, no URL, no query, no key; a path that is no
route of ours is ``other``. The id is the client's ``X-Request-Id`` or a new one; it is handed to
vLLM, whose answer's own id then holds it, and comes back as a header. The outermost layer of all.
"""

import json
import logging
import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from time import perf_counter
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from era_vllm.compat.starlette_path import get_route_path, matched_path
from era_vllm_server.metrics import RESPONSES
from era_vllm_server.refusals import STATUS

LOGGER: Final = "era_vllm_server.requests"
ITEMS: Final = "era_items"
"""Key of ``request.state`` where what was done with each item is left, with its modality."""
SHOWN: Final = ("pruning_rate", "level", "source", "clamped", "tokens_before", "tokens_after")
QUIET: Final = frozenset({"/health", "/ready", "/metrics", "/ping"})
"""Asked every few seconds by machines."""
_HEADER: Final = b"x-request-id"
_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
CLIENT_GONE: Final = 499
"""In place of a status where the client left before the end; nginx's number."""
_NO_RESPONSE: Final = 500
"""Of an exception, which a layer around this one answers."""


class RequestLog:
    """The outermost layer: a request's id, its count and its line; without lines the first two."""

    def __init__(self, app: ASGIApp, *, lines: bool) -> None:
        self.app = app
        self._logger = _logger() if lines else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name, scope = _named(scope)
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
                status = int(message["status"])
                others = [pair for pair in message.get("headers", []) if pair[0] != _HEADER]
                message = {**message, "headers": [*others, (_HEADER, name)]}
            await send(message)

        try:
            await self.app(scope, receiving, sending)
        finally:
            if get_route_path(scope) not in QUIET:
                last = CLIENT_GONE if left else int(scope["state"].get(STATUS, status))
                RESPONSES.labels(str(last)).inc()
                if self._logger is not None:
                    self._write(name, scope, last, perf_counter() - started)

    def _write(self, name: bytes, scope: Scope, status: int, seconds: float) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": "request",
            "id": name.decode(),
            "method": scope["method"],
            "route": _route(scope),
            "status": status,
            "ms": round(seconds * 1e3, 1),
            **_shown(scope["state"].get(ITEMS, ())),
        }
        self._logger.info(json.dumps(line))


def _shown(items: Sequence[tuple[str, Mapping[str, object]]]) -> dict[str, list[object]]:
    """Return what was done with a request's items; videos only where there are some."""
    shown: dict[str, list[object]] = {"images": []}
    for modality, one in items:
        shown.setdefault(f"{modality}s", []).append({key: one[key] for key in SHOWN})
    return shown


def _logger() -> logging.Logger:
    logger = logging.getLogger(LOGGER)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


def _named(scope: Scope) -> tuple[bytes, Scope]:
    """Return a request's id, and its scope as the application is to see it: with that id."""
    given = next((value for name, value in scope["headers"] if name == _HEADER), b"")
    name = given if _ID.fullmatch(given) else uuid.uuid4().hex.encode()
    others = [pair for pair in scope["headers"] if pair[0] != _HEADER]
    headers = [*others, (_HEADER, name)]
    return name, {**scope, "headers": headers, "state": dict(scope.get("state") or {})}


def _route(scope: Scope) -> str:
    """Return the path of the application's own route, which holds nothing of a client's."""
    return matched_path(getattr(scope.get("app"), "routes", ()), scope) or "other"
