"""The outermost layer: keys, sizes, deadline, around an application that forces faults."""

import asyncio
import gc
import hashlib
import json
import time
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY
from starlette.middleware.cors import CORSMiddleware

from era_vllm.errors import ConfigError
from era_vllm_server.middleware import Front, Stack, deadline, limits


class Wire:
    """A client's side: sends these messages, then nothing until it hangs up."""

    def __init__(self, *messages, hangs_up=False):
        self.left = list(messages) + [{"type": "http.disconnect"}] * hangs_up
        self.sent = []

    async def receive(self):
        if self.left:
            return self.left.pop(0)
        await asyncio.Event().wait()

    async def send(self, message):
        self.sent.append(message)

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def headers(self):
        return dict(self.sent[0]["headers"])

    @property
    def body(self):
        return b"".join(message["body"] for message in self.sent[1:])


class Layer:
    """What vLLM's own authentication looks like from outside."""

    def __init__(self, app, tokens):
        self.app, self.api_tokens = app, tokens

    async def __call__(self, *connection):
        await self.app(*connection)


def body(*parts):
    return [
        {"type": "http.request", "body": part, "more_body": at < len(parts) - 1}
        for at, part in enumerate(parts)
    ]


def scope(path="/v1/models", method="POST", headers=(), **more):
    return {"type": "http", "path": path, "method": method, "headers": list(headers), **more}


def ask(guard, scope, wire=None):
    wire = wire or Wire(*body(b"{}"))

    async def run():
        async with asyncio.timeout(10):
            await guard(scope, wire.receive, wire.send)

    asyncio.run(run())
    return wire


class App:
    """Reads the body, works until its client goes away, and says what it saw."""

    def __init__(self, status=200, kind=b"application/json", work_s=0.0, chunks=1):
        self.status, self.kind, self.work_s, self.chunks = status, kind, work_s, chunks
        self.read = 0
        self.seen = []
        self.ended = "not begun"

    async def __call__(self, scope, receive, send):
        self.seen.append(scope)
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.ended = "client gone"
                return
            self.read += len(message["body"])
            more = message["more_body"]
        gone = asyncio.create_task(receive())
        headers = [(b"content-type", self.kind)]
        if self.chunks > 1:
            await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for _ in range(self.chunks):
            await asyncio.wait({gone}, timeout=self.work_s)
            if gone.done():
                assert gone.result() == {"type": "http.disconnect"}
                self.ended = "client gone"
                return
            if self.chunks > 1:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        gone.cancel()
        if self.chunks == 1:
            await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})
        self.ended = "answered"


@pytest.fixture
def make(monkeypatch, tmp_path):
    def make(app, keys=None, **settings):
        settings.setdefault("drain_timeout_s", 0)
        if keys is not None:
            (tmp_path / "keys").write_text(keys)
            settings["api_keys_file"] = tmp_path / "keys"
        for name, value in settings.items():
            monkeypatch.setenv(f"ERA_{name.upper()}", str(value))
        return Stack(app)

    return make


def counted(name, **labels):
    return REGISTRY.get_sample_value(f"era:{name}_total", labels) or 0


def bearer(key):
    return (b"authorization", b"Bearer " + key.encode())


def error_of(text):
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_vllm_that_keeps_its_server_elsewhere_is_not_served(make):
    """Raised in the lifespan it would be, without drain and bounds: uvicorn takes it for none."""
    application = SimpleNamespace(state=SimpleNamespace())
    wire = ask(make(App()), {"type": "lifespan", "app": application}, Wire())
    (said,) = wire.sent
    assert said["type"] == "lifespan.startup.failed" and "server" in said["message"]


def test_open_paths_are_open_to_reading_alone(make):
    """A body to one of them would be read and parsed for somebody without a key."""
    guard = make(App(), keys="a")
    assert ask(guard, scope("/health", method="POST")).status == 401
    for path in ("/health", "/ready"):
        application = App()
        assert ask(make(application, keys="a"), scope(path, method="HEAD")).status == 200
        assert application.seen[0]["method"] == "GET"


def test_without_keys_everybody_passes(make):
    assert ask(make(App()), scope()).body == b"ok"


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models", [], 401),
        ("/v1/models", [bearer("a")], 200),
        ("/v1/models", [bearer("b")], 200),
        ("/v1/models", [(b"x-api-key", b"b")], 200),
        ("/v1/models", [bearer("ab")], 401),
        ("/v1/models", [(b"authorization", b"Basic a")], 401),
        ("/v1/models", [(b"authorization", b"a")], 401),
        *((path, [], 401) for path in ("/tokenize", "/metrics", "/invocations", "/ping", "/x", "")),
        *((path, [], 401) for path in ("/health/", "//health", "/HEALTH", "/health/../v1/models")),
        *((path, [], 200) for path in ("/health", "/ready", "/docs", "/static/swagger-ui.css")),
        ("/metrics", [bearer("a")], 200),
    ],
    ids=str,
)
def test_keys(make, path, headers, status):
    app = App()
    wire = ask(make(app, keys="a\nb\n"), scope(path, "GET", headers=headers))
    assert wire.status == status
    assert (len(app.seen) == 1) == (status == 200)
    if status == 401:
        assert wire.headers[b"www-authenticate"] == b"Bearer"
        assert error_of(wire.body)["code"] == 401


def test_vllm_sees_the_key_where_it_looks_for_it(make):
    app = App()
    ask(make(app, keys="a"), scope(headers=[(b"x-api-key", b"a"), bearer("z")]))
    assert app.seen[0]["headers"][::2] == [(b"x-api-key", b"a"), bearer("a")]


def test_behind_a_root_path_the_same_paths_are_open(make):
    guard = make(App(), keys="a")
    assert ask(guard, scope("/api/health", "GET", root_path="/api")).status == 200
    assert ask(guard, scope("/api/v1/models", root_path="/api")).status == 401


PREFLIGHT = [(b"origin", b"https://x"), (b"access-control-request-method", b"POST")]


def test_a_preflight_passes_and_no_other_options(make):
    guard = make(App(), keys="a")
    assert ask(guard, scope(method="OPTIONS", headers=PREFLIGHT)).status == 200
    for headers in ([], PREFLIGHT[:1], PREFLIGHT[1:]):
        assert ask(guard, scope("/metrics", method="OPTIONS", headers=headers)).status == 401


def test_names_of_pictures_need_keys(make):
    with pytest.raises(ConfigError, match="kept apart by API key"):
        make(App(), allow_image_uuid=True)
    make(App(), keys="a")


def test_the_path_is_never_read_from_the_host_header(make):
    for host in (b"x/health?", b"localhost/ready#", b"/health"):
        assert ask(make(App(), keys="a"), scope(headers=[(b"host", host)])).status == 401


def test_metrics_have_a_key_of_their_own(make, tmp_path):
    (tmp_path / "metrics").write_text("m")
    guard = make(App(), keys="a", metrics_key_file=tmp_path / "metrics")
    for path in ("/metrics", "/metrics/", "/metrics/x", "/metricsx"):
        assert ask(guard, scope(path, headers=[bearer("m")])).status == 200
        assert ask(guard, scope(path, headers=[bearer("a")])).status == 401
    assert ask(guard, scope(headers=[bearer("m")])).status == 401


def test_metrics_alone_may_have_a_key(make, tmp_path):
    (tmp_path / "metrics").write_text("m")
    guard = make(App(), metrics_key_file=tmp_path / "metrics")
    assert ask(guard, scope("/metrics")).status == 401
    assert ask(guard, scope()).status == 200


def test_vllms_own_keys_hold_everywhere(make):
    layered = Layer(Layer(App(), [hashlib.sha256(b"v").digest()]), [])
    guard = make(layered)
    assert ask(guard, scope("/tokenize")).status == 401
    assert ask(guard, scope("/tokenize", headers=[bearer("v")])).status == 200
    with pytest.raises(ConfigError, match="one of the two"):
        make(layered, keys="a")


def test_an_empty_keys_file_refuses_to_start(make):
    with pytest.raises(ConfigError, match="holds no key"):
        make(App(), keys="# nobody\n")


def test_a_websocket_needs_the_key_too(make):
    app = App()
    guard = make(app, keys="a")
    socket_scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    wire = Wire()
    asyncio.run(guard(socket_scope, wire.receive, wire.send))
    assert [message["type"] for message in wire.sent] == ["websocket.close"]
    assert not app.seen


@pytest.mark.parametrize(
    ("headers", "parts", "status"),
    [
        ([(b"content-length", b"1025")], [b""], 413),
        ([(b"content-length", b"9" * 5000)], [b""], 413),
        ([], [b"x" * 1024], 200),
        ([], [b"x" * 1000, b"x" * 24], 200),
        ([], [b"x" * 1000, b"x" * 25], 413),
        ([(b"content-length", b"5")], [b"x" * 1025], 413),
        ([(b"content-length", b"-1")], [b"x" * 1025], 413),
        ([(b"content-length", b"many")], [b"x" * 1024], 200),
        ([(b"transfer-encoding", b"chunked")], [b"x" * 100] * 11, 413),
    ],
    ids=str,
)
def test_body_size(make, headers, parts, status):
    app = App()
    guard = make(app, max_body_bytes=1024)
    wire = ask(guard, scope(headers=headers), Wire(*body(*parts)))
    assert wire.status == status
    assert app.read <= 1024
    if status == 413:
        assert wire.headers[b"connection"] == b"close"
        assert "1024 bytes" in error_of(wire.body)["message"]


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_what_has_no_use_for_a_body_has_none(make, method):
    """Open paths and preflights ask for no key, and bodies of all together are bounded."""
    assert ask(make(App()), scope("/v1/x", method), Wire(*body(b"x" * 99))).status == 200
    large = [(b"content-length", b"20000")]
    assert ask(make(App(), keys="a"), scope("/health", method, large), Wire()).status in (401, 413)
    parts = Wire(*body(b"x" * 20_000, b"x"))
    refused = ask(make(App(), keys="a"), scope("/health", method), parts)
    assert refused.status in (401, 413)
    assert refused.status == 401 or "longer than 16384 bytes" in error_of(refused.body)["message"]


def test_a_body_that_trickles_is_ended(make, monkeypatch):
    """However much of it came at once."""
    monkeypatch.setattr(limits, "WINDOW_S", 0.1)
    guard = make(App())
    wire = ask(guard, scope(), Wire(*body(b"x" * 100_000, b"x")[:1]))
    assert wire.status == 408 and wire.headers[b"connection"] == b"close"
    assert ask(guard, scope()).status == 200


def test_bodies_of_all_requests_are_bounded(make):
    guard = make(App(work_s=0.3), max_body_bytes=1024, max_bodies_bytes=1500)
    first, second, third = (Wire(*body(b"x" * 1000)) for _ in range(3))

    async def run():
        both = (guard(scope(), wire.receive, wire.send) for wire in (first, second))
        await asyncio.gather(*both)
        await guard(scope(), third.receive, third.send)  # what was taken is given back

    asyncio.run(run())
    assert [first.status, second.status, third.status] == [200, 503, 200]
    assert second.headers[b"retry-after"] == b"2"


def test_a_503_gets_retry_after(make):
    guard = make(App(status=503), retry_after_s=9)
    assert ask(guard, scope()).headers[b"retry-after"] == b"9"
    assert b"retry-after" not in ask(make(App()), scope()).headers


def test_the_deadline_tells_the_app_that_its_client_is_gone(make):
    app = App(work_s=5)
    wire = ask(make(app, request_timeout_s=0.1), scope())
    assert (wire.status, app.ended) == (504, "client gone")
    assert "0.1 s" in error_of(wire.body)["message"]


def test_the_deadline_holds_for_a_body_that_does_not_come(make):
    app = App()
    wire = ask(make(app, request_timeout_s=0.1), scope(), Wire(*body(b"a", b"b")[:1]))
    assert (wire.status, app.ended) == (504, "not begun")


def test_the_deadline_in_a_stream_is_an_event(make, monkeypatch):
    monkeypatch.setattr(deadline, "PATIENCE_S", 9)  # a machine may stand still for a second
    app = App(kind=b"text/event-stream; charset=utf-8", work_s=0.04, chunks=1000)
    wire = ask(make(app, request_timeout_s=0.1), scope())
    assert (wire.status, app.ended) == (200, "client gone")
    events = wire.body.lstrip(b"x").decode().split("\n\n")
    assert events[0].startswith("event: error\ndata: ")
    assert error_of(events[0].partition("data: ")[2])["code"] == 504
    assert events[1:] == ["data: [DONE]", ""]
    assert not wire.sent[-1].get("more_body", False)


def test_a_json_response_that_has_begun_is_left_to_finish(make):
    app = App(work_s=0.04, chunks=5)
    wire = ask(make(app, request_timeout_s=0.1), scope())
    assert (app.ended, wire.body) == ("answered", b"xxxxxok")


def test_an_app_that_goes_on_after_its_end_is_not_heard(make):
    """As vLLM's cancelled handlers, which return None: FastAPI makes 200 null of it."""

    async def app(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"null"})

    assert ask(make(app, request_timeout_s=0.1), scope()).status == 504


def test_errors_of_the_app_are_its_own(make):
    async def app(scope, receive, send):
        raise KeyError("x")

    with pytest.raises(KeyError):
        ask(make(app, request_timeout_s=9), scope())


def test_a_client_that_hangs_up_is_told_to_the_app(make):
    app = App(work_s=5)
    wire = ask(make(app, request_timeout_s=9), scope(), Wire(*body(b"{}"), hangs_up=True))
    assert (app.ended, wire.sent) == ("client gone", [])


def test_a_mistyped_variable_refuses_to_start(make, monkeypatch):
    monkeypatch.setenv("ERA_API_KEY_FILE", "keys")
    with pytest.raises(ConfigError, match="ERA_API_KEYS_FILE"):
        make(App())


def test_an_error_at_the_start_is_told_to_uvicorn(monkeypatch):
    """Where it is raised uvicorn serves all the same; the real process: ``test_guard_http``."""
    monkeypatch.setenv("ERA_API_KEY_FILE", "keys")
    app = App()
    wire = ask(Front(app), {"type": "lifespan"}, Wire({"type": "lifespan.startup"}))
    (said,) = wire.sent
    assert said["type"] == "lifespan.startup.failed" and "ERA_API_KEYS_FILE" in said["message"]
    assert not app.seen


@pytest.mark.parametrize("begun", [False, True])
def test_an_app_that_does_not_listen_is_answered_for_and_goes_on(make, monkeypatch, begun):
    monkeypatch.setattr(deadline, "PATIENCE_S", 0.1)
    ended = []

    async def deaf(scope, receive, send):
        start = {"type": "http.response.start", "status": 200, "headers": STREAM}
        if begun:
            await send(start)
        await asyncio.sleep(0.6)
        try:
            await send(start)
        except OSError as error:
            ended.append(str(error))

    async def run(gate, wire):
        started = time.monotonic()
        await gate(scope(), wire.receive, wire.send)
        took = time.monotonic() - started
        gc.collect()
        await asyncio.sleep(0.7)
        return took

    wire = Wire(*body(b"{}"))
    before = counted("responses", status="504")
    took = asyncio.run(run(make(deaf, request_timeout_s=0.1), wire))
    assert 0.2 <= took < 0.5
    assert wire.status == (200 if begun else 504) and b"0.1 s" in wire.body
    assert ended == ["the request was stopped"]
    assert counted("responses", status="504") == before + 1


STREAM = [(b"content-type", b"text/event-stream")]


async def silent(scope, receive, send):
    """Ends without an answer, as a handler whose client has gone."""


CASES = {
    "200": (App(), {}, {}),
    "400": (App(status=400), {}, {}),
    "401": (App(), {"keys": "a"}, {}),
    "413": (App(), {"max_body_bytes": 1024}, {"headers": [(b"content-length", b"1025")]}),
    "503": (App(status=503), {}, {}),
    "504": (App(work_s=5), {"request_timeout_s": 0.1}, {}),
    "504 in a stream": (
        App(kind=STREAM[0][1], work_s=0.04, chunks=1000),
        {"request_timeout_s": 0.1},
        {},
    ),
    "500": (silent, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_response_is_counted_once_as_what_was_told(make, case):
    app, settings, more = CASES[case]
    before = statuses()
    ask(make(app, **settings), scope(**more))
    assert added_since(before) == {case[:3]: 1}


def test_errors_and_clients_that_leave_are_counted_and_probes_are_not(make):
    async def broken(scope, receive, send):
        raise KeyError("x")

    before = statuses()
    with pytest.raises(KeyError):
        ask(make(broken), scope())
    assert added_since(before) == {"500": 1}
    before = statuses()
    ask(make(App(work_s=5)), scope(), Wire(*body(b"{}"), hangs_up=True))
    assert added_since(before) == {"499": 1}
    before = statuses()
    for path in ("/health", "/ready", "/metrics", "/ping"):
        ask(make(App(status=503)), scope(path, method="GET"))
    assert added_since(before) == {}


def statuses():
    (family,) = [one for one in REGISTRY.collect() if one.name == "era:responses"]
    return {one.labels["status"]: one.value for one in family.samples if one.name.endswith("total")}


def added_since(before):
    now = statuses()
    return {at: now[at] - before.get(at, 0) for at in now if now[at] != before.get(at, 0)}


def test_busy_is_what_was_not_admitted(make):
    before = counted("rejected_requests", reason="busy")
    gate = make(App(status=503))
    for path in ("/health", "/ready", "/v1/models"):
        ask(gate, scope(path, method="GET"))
    assert counted("rejected_requests", reason="busy") == before
    ask(gate, scope())
    assert counted("rejected_requests", reason="busy") == before + 1


@pytest.mark.parametrize("origin", [b"https://mine", b"https://evil"])
def test_browsers_can_read_what_the_guard_refuses(make, origin):
    """A script of an allowed origin sees the status, before and after the app is reached."""
    cors = CORSMiddleware(App(work_s=5), allow_origins=["https://mine"])
    gate = make(Layer(cors, []), keys="a", request_timeout_s=0.1, max_body_bytes=1024)
    large = (b"content-length", b"1025")
    for status, headers in ((401, []), (413, [bearer("a"), large]), (504, [bearer("a")])):
        wire = ask(gate, scope(headers=[(b"origin", origin), *headers]))
        told = wire.headers.get(b"access-control-allow-origin")
        assert (wire.status, told) == (status, origin if origin == b"https://mine" else None)
        wire = ask(gate, scope(headers=headers))
        assert (wire.status, b"access-control-allow-origin" in wire.headers) == (status, False)


def test_while_it_drains_newcomers_are_told_and_counted(make, monkeypatch):
    """Browsers too: their preflight passes, so that they see the 503."""
    monkeypatch.setattr("os.kill", lambda *_: None)
    cors = CORSMiddleware(App(), allow_origins=["https://mine"], allow_methods=["*"])
    gate = make(Layer(cors, []))
    before = counted("rejected_requests", reason="draining"), statuses()

    async def run(wire, **more):
        if not gate.drain.draining:
            gate.drain._begin()
        await gate(scope(**more), wire.receive, wire.send)
        return wire

    wire = asyncio.run(run(Wire(*body(b"{}")), headers=[(b"origin", b"https://mine")]))
    told = (b"retry-after", b"2"), (b"access-control-allow-origin", b"https://mine")
    assert wire.status == 503 and set(told) <= set(wire.headers.items())
    preflight = [(b"origin", b"https://mine"), PREFLIGHT[1]]
    assert asyncio.run(run(Wire(*body(b"")), method="OPTIONS", headers=preflight)).status == 200
    assert counted("rejected_requests", reason="draining") == before[0] + 1
    assert added_since(before[1]) == {"503": 1, "200": 1}
    wire = asyncio.run(run(Wire(), path="/v1/realtime", type="websocket"))
    assert wire.sent == [{"type": "websocket.close", "code": 1012, "reason": "draining"}]
