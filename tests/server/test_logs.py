"""One JSON line a request, and nothing in it that a client said."""

import asyncio
import io
import json
import logging

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import BaseRoute, Route, Router

from era_vllm_server.middleware.log import ITEMS, LOGGER, RequestLog, _route

IMAGE = {
    "pruning_rate": 0.889,
    "level": "strong",
    "source": "detail",
    "clamped": False,
    "tokens_before": 144,
    "tokens_after": 16,
}
SECRET = "hunter2"


async def chat(request):
    await request.body()
    request.state.__setattr__(ITEMS, [("image", {**IMAGE, "url": f"https://x.example/{SECRET}"})])
    return JSONResponse({"seen": request.headers["x-request-id"]})


async def stream(request):
    async def parts():
        for _ in range(3):
            await asyncio.sleep(0.02)
            yield b"x"

    return StreamingResponse(parts())


async def broken(request):
    raise RuntimeError(SECRET)


class Included(BaseRoute):
    """A router among the routes, as FastAPI has them from 0.137 on."""

    def __init__(self, *routes):
        self._router = Router(routes)

    def matches(self, scope):
        (route,) = self._router.routes
        return route.matches(scope)[0], {}

    def effective_candidates(self):
        return self._router.routes

    async def handle(self, scope, receive, send):
        await self._router(scope, receive, send)


@pytest.fixture
def served(monkeypatch):
    """``served(path, ...)``: ask the application behind the layer; returns response and lines."""
    sink = io.StringIO()
    logger = logging.getLogger(LOGGER)
    handler = logging.StreamHandler(sink)
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    logger.setLevel(logging.INFO)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/responses/{id}", lambda request: PlainTextResponse("one")),
            Route("/stream", stream),
            Route("/broken", broken),
            Included(Included(Route("/v1/models/{name}", lambda request: PlainTextResponse("m")))),
            Route("/health", lambda request: PlainTextResponse("ok")),
        ],
        exception_handlers={Exception: lambda request, error: PlainTextResponse("no", 500)},
    )
    app.add_middleware(RequestLog, lines=True)  # as vLLM does: inside of what answers exceptions

    def ask(method, path, **options):
        async def go():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://era") as client:
                return await client.request(method, path, **options)

        sink.seek(0)
        sink.truncate()
        response = asyncio.run(go())
        assert SECRET not in sink.getvalue()
        return response, [json.loads(line) for line in sink.getvalue().splitlines()]

    return ask


def test_a_request_is_one_line_with_what_was_done(served):
    body = {"messages": [{"role": "user", "content": SECRET}]}
    headers = {"X-Request-Id": "abc-1", "Authorization": f"Bearer {SECRET}"}
    path = f"/v1/chat/completions?key={SECRET}"
    response, (line,) = served("POST", path, json=body, headers=headers)
    assert line.pop("ms") >= 0
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "event": "request",
        "id": "abc-1",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "images": [IMAGE],
    }
    assert response.json()["seen"] == response.headers["x-request-id"] == "abc-1"


@pytest.mark.parametrize("given", [None, "", "a b", 'x"}\\n{"event": "forged"', "x" * 129])
def test_an_id_that_is_missing_or_odd_is_replaced(served, given):
    headers = {} if given is None else {"X-Request-Id": given}
    response, (line,) = served("POST", "/v1/chat/completions", headers=headers)
    assert len(line["id"]) == 32 and line["id"] == response.headers["x-request-id"]
    assert response.json()["seen"] == line["id"]


def test_paths_of_clients_are_not_written(served):
    for path, route, status in (
        (f"/v1/responses/{SECRET}", "/v1/responses/{id}", 200),
        (f"/{SECRET}", "other", 404),
        ("/broken", "/broken", 500),
        (f"/v1/models/{SECRET}", "/v1/models/{name}", 200),
    ):
        _, (line,) = served("GET", path)
        assert (line["route"], line["status"]) == (route, status)


def test_the_installed_fastapis_routers_are_looked_into():
    """Whatever its version makes of them; the path with the prefixes of all."""
    inner, outer, app = APIRouter(prefix="/b"), APIRouter(prefix="/a"), FastAPI()
    inner.get("/{name}")(lambda name: name)
    outer.include_router(inner)
    app.include_router(outer)
    scope = {"type": "http", "method": "GET", "path": "/a/b/c", "headers": [], "app": app}
    assert _route(scope) == "/a/b/{name}"


def test_a_client_that_leaves_is_told_from_one_that_stays(monkeypatch):
    async def waits(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        await JSONResponse(None)(scope, receive, send)  # what vLLM's handlers come to

    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    monkeypatch.setattr(logging.getLogger(LOGGER), "handlers", [handler])
    messages = [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    async def send(message):
        pass

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    asyncio.run(RequestLog(waits, lines=True)(scope, receive, send))
    assert json.loads(sink.getvalue())["status"] == 499


def test_a_stream_is_timed_to_its_end_and_probes_are_quiet(served):
    _, (line,) = served("GET", "/stream")
    assert line["ms"] >= 55
    assert served("GET", "/health")[1] == []
