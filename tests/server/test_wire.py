"""What a connection may send before any application is asked, at a real uvicorn."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
import uvicorn

from era_vllm.compat import uvicorn_h11
from era_vllm.lab.servers import free_port
from era_vllm_server.front import MAX_HEAD_BYTES
from tests.forked import parent
from tests.server.attacker import Pair

pytest_plugins = ["tests.server.guarded"]
LINE = b"GET /health HTTP/1.1\r\nHost: x\r\n"
LARGE = 2**26
MIDDLE = 2**23
POST = b"POST /health HTTP/1.1\r\nHost: x\r\n"


async def application(scope, receive, send):
    """Answers once the body has come."""
    if scope["type"] == "lifespan":
        return
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    large = {"/large": LARGE, "/middle": MIDDLE}
    body = b"x" * large[scope["path"]] if scope["path"] in large else str(size).encode()
    head = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[uvicorn.Server, int]]:
    """A bounded server whose patience is short, and its port."""
    monkeypatch.setattr(uvicorn_h11, "TIMEOUT_S", 0.5)
    config = uvicorn.Config(application, port=0, log_level="error", lifespan="off")
    config.h11_max_incomplete_event_size = MAX_HEAD_BYTES
    config.load()
    uvicorn_h11.use_bounded_h11(config, lambda status, reason: None)
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        run = lambda: asyncio.run(server.serve([listening]))  # noqa: E731
        thread = threading.Thread(target=run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield server, listening.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture
def port(running: tuple[uvicorn.Server, int]) -> int:
    """Its port."""
    return running[1]


def comes_to(server: uvicorn.Server, count: int) -> bool:
    """Wait until a server has so many connections, however slow the machine is."""
    end = time.monotonic() + 60
    while len(server.server_state.connections) != count and time.monotonic() < end:
        time.sleep(0.05)
    return len(server.server_state.connections) == count


def said(port: int, *parts: bytes, forever: bytes = b"") -> bytes:
    """Send parts, then one of them again and again; returns all that comes until the end."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        try:
            for part in parts:
                sock.sendall(part)
            end = time.monotonic() + 20
            while forever and time.monotonic() < end:
                sock.sendall(forever)
            while received := sock.recv(65536):
                found += received
        except (ConnectionResetError, BrokenPipeError):
            return found or b"cut"
    return found


def test_requests_of_any_allowed_kind_are_answered(port):
    chunks = b"".join(b"10\r\n" + b"x" * 16 + b"\r\n" for _ in range(100_000))
    close = b"Connection: close\r\n"
    assert said(port, LINE + close + b"X: " + b"y" * 200_000 + b"\r\n\r\n").endswith(b"\r\n\r\n0")
    body = b"x" * 2**22
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    assert said(port, POST + close + length + body).endswith(b"\r\n\r\n4194304")
    chunked = POST + close + b"Transfer-Encoding: chunked\r\n\r\n"
    assert said(port, chunked + chunks + b"0\r\n\r\n").endswith(b"\r\n\r\n1600000")


def test_one_connection_serves_one_request_after_another(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        for _ in range(3):
            wire.sendall(LINE + b"\r\n")
            found = b""
            while not found.endswith(b"\r\n\r\n0"):
                found += wire.recv(65536)


def test_a_second_request_waits_for_the_first_ones_answer(port):
    """In the socket, not in memory, and is answered in its turn."""
    last = LINE + b"Connection: close\r\n\r\n"
    assert said(port, (LINE + b"\r\n") * 5000 + last).count(b"HTTP/1.1 200") == 5001


def test_a_body_in_crumbs_is_refused(port):
    """Each chunk is 10 microseconds in which everybody waits."""
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    few = chunked.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + b"1\r\nx\r\n" * 60
    assert said(port, few + b"0\r\n\r\n").endswith(b"\r\n\r\n60")
    answer = said(port, chunked, forever=b"1\r\nx\r\n" * 10_000)
    assert answer == b"cut" or (answer.startswith(b"HTTP/1.1 400") and b"chunk_size" in answer)


def test_two_lengths_are_the_last_request(port):
    """RFC 9112 6.1: what reads the other one would see another request behind it."""
    both = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    assert said(port, POST + both + LINE + b"\r\n").count(b"HTTP/1.1 ") == 1


def test_lines_in_one_chunk_are_no_crumbs(port):
    lines = b'" 12,\r\n"' * 100_000
    chunk = b"%x\r\n" % len(lines) + lines + b"\r\n0\r\n\r\n"
    chunked = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert said(port, chunked + chunk).endswith(b"\r\n\r\n%d" % len(lines))


def test_a_client_that_reads_slowly_is_served(port):
    """Without a pause as long as the timeout, but for longer than it in all."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**18)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", port))
        sock.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        found, started = 0, time.monotonic()
        while received := sock.recv(2**20):
            found += len(received)
            if time.monotonic() - started < 2:
                time.sleep(0.02)
    assert found > LARGE


def test_a_client_that_reads_none_of_many_answers_is_left(running):
    """What is written is less than what makes a server stop to write."""
    server, port = running
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        sock.settimeout(0.2)
        left, end = (LINE + b"\r\n") * 20_000, time.monotonic() + 5
        while left and time.monotonic() < end:
            try:
                left = left[sock.send(left) :]
            except TimeoutError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                break
        assert comes_to(server, 0)


def test_a_client_that_does_not_read_its_last_answer_is_left(port):
    """uvicorn closes behind it, and would wait for the reader without an end."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        sock.sendall(b"GET /middle HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        time.sleep(3)
        sock.settimeout(20)
        found = 0
        with suppress(ConnectionResetError):
            while received := sock.recv(65536):
                found += len(received)
    assert found < MIDDLE


H2C = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\nContent-Length: 5\r\n\r\nhello"
)


def test_an_upgrade_to_http2_is_ignored(port):
    """As RFC 9110 7.8 allows; every JDK HttpClient asks for it on http://."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        for _ in range(2):
            sock.sendall(POST + H2C)
            found = b""
            while not found.endswith(b"\r\n\r\n5"):
                found += sock.recv(65536)
            assert found.startswith(b"HTTP/1.1 200")


def test_a_client_that_stops_to_read_is_left(running):
    server, port = running
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.settimeout(20)
        wire.connect(("127.0.0.1", port))
        wire.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert comes_to(server, 1) and comes_to(server, 0)
        found = 0
        with suppress(ConnectionResetError):
            while received := wire.recv(65536):
                found += len(received)
    assert found < LARGE


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (LINE, b"X: y\r\n" * 9999),
        (LINE + b"X: ", b"y" * 60_000),
        (b"GET /", b"y" * 60_000),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"X: y\r\n" * 9999),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1;", b"y" * 60_000),
    ],
    ids=["headers", "a header", "a path", "trailers", "a chunk's extension"],
)
def test_what_does_not_end_is_cut_off(port, start, more):
    answer = said(port, start, forever=more)
    assert answer == b"cut" or answer.startswith(b"HTTP/1.1 431"), answer[:200]


LATER = [
    (LINE, b"", True),
    (b"", b"", False),  # nothing was asked, nothing is said
    (LINE + b"\r\n", LINE, True),
    (LINE + b"\r\n", b"\r\n", True),  # which begins no request
]


@pytest.mark.parametrize(("start", "later", "told"), LATER, ids=range(len(LATER)))
def test_a_head_that_does_not_come_is_not_waited_for(port, start, later, told):
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        wire.sendall(start)
        if later:
            time.sleep(0.2)
            wire.sendall(later)
        assert (b"HTTP/1.1 408 " in wire.makefile("rb").read()) == told
    assert time.monotonic() - began < 5


def test_a_slow_body_is_waited_for(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(POST + b"Connection: close\r\nContent-Length: 3\r\n\r\n")
        for _ in range(3):
            time.sleep(0.4)
            sock.sendall(b"x")
        assert sock.makefile("rb").read().endswith(b"\r\n\r\n3")


def test_an_upgrade_that_nobody_answers_is_ignored(port):
    head = b"Connection: close, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    key = b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nContent-Length: 2\r\n\r\n{}"
    assert said(port, POST + head + key).endswith(b"\r\n\r\n2")


DEAF = """
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from era_vllm_server.middleware import Front

async def events():
    while True:
        yield "data: " + "x" * 65536 + "\\n\\n"

app = FastAPI()
app.add_middleware(Front)
app.add_api_route("/v1/x", lambda: StreamingResponse(events(), media_type="text/event-stream"))
server = app.state.server = uvicorn.Server(uvicorn.Config(app, port=PORT, log_level="error"))
try:
    server.run()
except KeyboardInterrupt:  # which uvicorn passes on; vLLM's server does not
    pass
"""


def test_a_client_that_does_not_read_keeps_no_server_from_its_end(tmp_path):
    port = free_port()
    code, variables = DEAF.replace("PORT", str(port)), {"ERA_DRAIN_TIMEOUT_S": "1"}
    child = parent().start(["-c", code], variables, str(tmp_path / "log"))
    try:
        while child.poll() is None:
            try:
                wire = socket.create_connection(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        with wire:
            wire.sendall(b"GET /v1/x HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in wire.recv(100)
            time.sleep(1)
            os.kill(child.pid, signal.SIGTERM)
            assert child.wait(20) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def test_the_real_server_is_bounded(pair: Pair) -> None:
    answer = said(pair.server.port, LINE, forever=b"X: y\r\n" * 9999)
    assert answer == b"cut" or answer.startswith(b"HTTP/1.1 431"), answer[:200]
    assert pair.alive()
