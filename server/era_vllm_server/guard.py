"""The outermost ASGI layer: every request passes it first (``--middleware``)."""

from starlette.types import ASGIApp, Receive, Scope, Send


class Guard:
    """Hands everything on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        await self.app(scope, receive, send)
