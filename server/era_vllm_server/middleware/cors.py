"""Gives refusals of ours the headers that vLLM's CORS layer, which is inside, gives the others.

Without them a script sees a network error, and no status.
"""

from collections.abc import Iterator
from functools import partial

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Cors:
    """The layer; does nothing where vLLM, whose layers stand further in, has none."""

    def __init__(self, app: ASGIApp, inner: ASGIApp) -> None:
        self.app = app
        self._cors = next((at for at in layers(inner) if isinstance(at, CORSMiddleware)), None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if self._cors is not None and scope["type"] == "http" and "origin" in headers:
            send = partial(_with_headers, self._cors, headers, send)
        await self.app(scope, receive, send)


def layers(app: ASGIApp) -> Iterator[object]:
    """Yield an application's layers, the outermost first."""
    layer: object = app
    while layer is not None:
        yield layer
        layer = getattr(layer, "app", None)


async def _with_headers(
    cors: CORSMiddleware, request_headers: Headers, send: Send, message: Message
) -> None:
    own = "access-control-allow-origin" not in Headers(raw=message.get("headers", []))
    if message["type"] == "http.response.start" and own:
        await cors.send(message, send=send, request_headers=request_headers)
    else:
        await send(message)
