"""The outermost layer of the real server: every route, cut bodies, and an engine that stops."""

import base64
import json
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import openai
import pytest

from era_vllm.lab import CHECKPOINT
from era_vllm.lab.servers import Server
from era_vllm_server.front import MIDDLEWARE
from tests.server.asking import MESSAGES, RESPONSES
from tests.server.attacker import (
    DEADLINE_S,
    ENGINE,
    KEYS,
    MAX_BODY,
    METRICS_KEY,
    QUEUE,
    QUEUE_TOKENS,
    STOCK,
    VARIABLES,
    client,
    data_url,
    heavy,
    metric,
    picture,
    png,
    request,
)

pytest_plugins = ["tests.server.guarded"]
WRONG = "wrong-key"


def test_real_routes_are_closed_without_a_key(pair):
    with client(pair.server) as nobody, client(pair.server, WRONG) as somebody:
        routes = pair.ours.get("/openapi.json").json()["paths"]
        assert {"/v1/chat/completions", "/tokenize", "/metrics", "/v1/models"} <= set(routes)
        for path, methods in routes.items():
            for method in methods:
                for caller in (nobody, somebody):
                    status = caller.request(method, path, json={}).status_code
                    assert (status == 401) == (path not in ("/health", "/ready")), path
        assert nobody.get("/health").status_code == 200
    with client(pair.server, KEYS[1]) as other:
        assert other.get("/v1/models").status_code == 200
        assert other.get("/metrics").status_code == 401
    assert pair.ours.get("/metrics", headers={"Authorization": f"Bearer {METRICS_KEY}"}).is_success
    with httpx.Client(base_url=pair.server.url, headers={"x-api-key": KEYS[0]}) as anthropic:
        assert anthropic.get("/v1/models").status_code == 200


def test_real_metrics_open_to_their_own_key_alone_whatever_the_method_and_spelling(pair):
    for path in ("/metrics", "/metrics/", "/metrics/x", "/metricsx"):
        for method in ("GET", "HEAD", "POST", "OPTIONS"):
            for key in (None, KEYS[0]):
                headers = {} if key is None else {"Authorization": f"Bearer {key}"}
                reply = httpx.request(method, f"{pair.server.url}{path}", headers=headers)
                assert reply.status_code == 401, (method, path, key)


def test_a_real_websocket_is_refused_without_a_key(pair):
    lines = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    head = f"GET /v1/realtime HTTP/1.1\r\nHost: x\r\n{lines}Sec-WebSocket-Key: {'A' * 22}==\r\n\r\n"
    first = raw(pair.server.port, head.encode()).splitlines()[0]
    assert b" 403 " in first or b" 401 " in first  # by whether the model has one at all


def raw(port, sent):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as wire:
        wire.sendall(sent)
        return wire.recv(65536)


def test_an_idle_connection_outlives_the_clients_and_proxies_own_limits(pair):
    """Stock closes it after five seconds, as httpx does: the next request may meet the closing."""
    ask = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    found = {}
    with ExitStack() as stack:
        for name, there in (("stock", pair.stock), ("ours", pair.ours)):
            wire = socket.create_connection(("127.0.0.1", there.base_url.port), timeout=30)
            found[name] = stack.enter_context(wire)
            wire.sendall(ask)
            assert b" 200 " in wire.recv(65536)
        time.sleep(6.5)
        assert found["stock"].recv(65536) == b""
        found["ours"].sendall(ask)
        assert b" 200 " in found["ours"].recv(65536)


def test_a_real_body_is_cut_off_while_it_streams(pair):
    sent = 0

    def endless():
        nonlocal sent
        for _ in range(200):
            sent += MAX_BODY // 4
            yield b"x" * (MAX_BODY // 4)

    reply = pair.ours.post("/v1/chat/completions", content=endless())
    assert reply.status_code == 413
    assert sent < 100 * MAX_BODY // 4
    assert reply.json()["error"]["code"] == 413
    whole = pair.ours.post("/v1/chat/completions", content=b"x" * (MAX_BODY + 1))
    assert whole.status_code == 413
    assert pair.alive()


def test_at_the_deadline_the_engine_stops(pair):
    """A whole answer and a stream at once, and what admission says meanwhile."""
    sdk = openai.OpenAI(base_url=f"{pair.server.url}/v1", api_key=KEYS[0], max_retries=0)

    def whole():
        started = time.monotonic()
        reply = pair.ours.post("/v1/chat/completions", json=heavy(QUEUE // 2))
        return reply, time.monotonic() - started

    def stream():
        chunks = []
        with pytest.raises(openai.APIError) as error:
            chunks.extend(sdk.chat.completions.create(**stream_body))
        return chunks, error.value

    stream_body = {**heavy(QUEUE // 4), "stream": True}
    stream_body["extra_body"] = {"ignore_eos": stream_body.pop("ignore_eos")}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(whole)
        soon = time.monotonic() + 5
        while not pair.work()[0] and time.monotonic() < soon:
            time.sleep(0.05)
        busy = pair.ours.post("/v1/chat/completions", json=heavy(QUEUE))
        second = pool.submit(stream)
        reply, took = first.result()
        _, ended = second.result()
    assert busy.status_code == 503
    assert int(busy.headers["retry-after"]) > 0
    assert reply.status_code == 504
    assert DEADLINE_S - 0.5 < took < DEADLINE_S + 5
    assert "took longer" in str(ended)
    end = time.monotonic() + 5
    while pair.work()[0] and time.monotonic() < end:
        time.sleep(0.1)
    requests, tokens = pair.work()
    time.sleep(1)
    assert (requests, pair.work()) == (0, (0, tokens))
    assert metric(pair.ours, "era:rejected_requests_total", reason="deadline") >= 2
    assert metric(pair.ours, "era:rejected_requests_total", reason="busy") >= 1
    assert pair.alive()


def long_response(turn):
    return {"input": "?", "max_output_tokens": 950, "ignore_eos": True}


def many_pictures(turn):
    """What keeps /v1/messages busy, where an answer cannot be made long: pictures that are new."""
    pictures = [base64.b64encode(png(picture(20 + at, 20 + turn))).decode() for at in range(12)]
    kind = {"type": "base64", "media_type": "image/png"}
    parts = [{"type": "image", "source": {**kind, "data": data}} for data in pictures]
    content = [*parts, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": 4, "era": {"level": "extreme"}}


@pytest.mark.parametrize(("path", "body"), [(RESPONSES, long_response), (MESSAGES, many_pictures)])
def test_at_the_deadline_the_engine_stops_on_the_other_routes(pair, path, body):
    """Each of their requests is one sequence; so many at once take longer than the deadline."""
    bodies = [{"model": "era-sample", **body(turn)} for turn in range(QUEUE - 10)]
    before = metric(pair.ours, "era:responses_total", status="504")

    def ask(body):
        reply = pair.ours.post(path, json=body)
        return reply.status_code if reply.status_code in (200, 504) else reply.text

    with ThreadPoolExecutor(len(bodies)) as pool:
        statuses = Counter(pool.map(ask, bodies))
    assert set(statuses) <= {200, 504} and statuses[504] > 10, dict(statuses)
    assert metric(pair.ours, "era:responses_total", status="504") == before + statuses[504]
    assert stopped(pair)


@pytest.mark.parametrize("stream", [False, True])
def test_of_a_client_that_leaves_no_sequence_goes_on(pair, stream):
    body = heavy(20, stream=stream)
    with client(pair.server, KEYS[0]) as leaving:
        if stream:
            with leaving.stream("POST", "/v1/chat/completions", json=body) as reply:
                next(reply.iter_lines())
                assert pair.work()[0]
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post("/v1/chat/completions", json=body, timeout=1)
    assert stopped(pair)


def stopped(pair):
    """Tell whether the engine does nothing, well before a deadline could have ended it."""
    end = time.monotonic() + DEADLINE_S / 2
    while pair.work()[0] and time.monotonic() < end:
        time.sleep(0.1)
    requests, tokens = pair.work()
    time.sleep(1)
    return (requests, pair.work()) == (0, (0, tokens))


def test_too_many_tokens_before_the_first_answer_are_a_503_that_says_when_to_come_again(pair):
    def ask(turn):
        prompts = [f"{turn} {at // 10} {at % 10} " + "yes " * 890 for at in range(40)]
        body = {"model": "era-sample", "prompt": prompts, "max_tokens": 1}
        return pair.ours.post("/v1/completions", json=body)

    reason, name = "max_num_queued_tokens", "vllm:admission_rejections_total"
    assert QUEUE_TOKENS < 40 * 890
    before = metric(pair.ours, name, reason=reason)
    with ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(ask, range(3)))
    shed = [reply for reply in replies if reply.status_code == 503]
    assert shed and {reply.status_code for reply in replies} <= {200, 503}, replies
    assert all(int(reply.headers["retry-after"]) > 0 for reply in shed)
    assert metric(pair.ours, name, reason=reason) > before


def test_refusals_are_counted_by_reason(pair):
    part = {"type": "image_url", "image_url": {"url": data_url(picture())}}
    bodies = {
        "body_size": "x" * (MAX_BODY + 1),
        "body_shape": "[" * 2000 + "]" * 2000,
        "era": json.dumps({"model": "era-sample", "prompt": "?", "era": {"level": "off"}}),
        "image_uuid": json.dumps({"messages": [{"content": [{**part, "uuid": "a"}]}]}),
        "image_pil": json.dumps({"messages": [{"content": [{"image_pil": "a"}]}]}),
    }

    def counted():
        return {
            reason: metric(pair.ours, "era:rejected_requests_total", reason=reason)
            for reason in (*bodies, "key")
        }

    before, told = counted(), metric(pair.ours, "era:responses_total")
    with client(pair.server, WRONG) as somebody:
        assert somebody.get("/v1/models").status_code == 401
    for reason, body in bodies.items():
        status = pair.ours.post("/v1/completions", content=body).status_code
        assert status == (413 if reason == "body_size" else 400), reason
    assert counted() == {reason: number + 1 for reason, number in before.items()}
    assert metric(pair.ours, "era:responses_total") == told + len(before)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_setting_that_cannot_be_used_ends_the_plain_line(tmp_path, count):
    """``era-vllm serve`` says so before the model is loaded; this line does not pass there."""
    (tmp_path / "keys").write_text("# nobody\n")
    command = [sys.executable, "-c", STOCK, str(CHECKPOINT), *ENGINE, "--middleware", MIDDLEWARE]
    variables = {**VARIABLES, "VLLM_PLUGINS": "none", "ERA_API_KEYS_FILE": str(tmp_path / "keys")}
    command += ["--api-server-count", str(count)]
    with Server("plain", command, variables, tmp_path / "log") as server:
        code = server.wait(180)
    log = (tmp_path / "log").read_text()
    print(code, log[-3000:])
    assert code and "holds no key, needed at least one" in log
    assert "lifespan' protocol appears unsupported" not in log


def test_cors_is_off(pair):
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    reply = pair.ours.options("/v1/chat/completions", headers=headers)
    assert "access-control-allow-origin" not in reply.headers


def test_pictures_in_a_request_are_served(pair):
    reply = pair.chat(pair.ours, data_url(picture()), data_url(png(picture(1, 1))))
    assert reply.status_code == 200
    assert request()["model"] == reply.json()["model"]
