"""Requests that nobody would write: no 500, no hang, no memory kept, and /health all the while.

``schemathesis`` makes bodies from the server's own OpenAPI description; for the chat route ours
are put over them, pictures and ``era`` fields among them. The suite runs for about a minute;
``FUZZ=2000`` is the number of examples a route for a long run:

    FUZZ=2000 .venv/bin/python -m pytest tests/server/test_fuzz.py --timeout 0
"""

import importlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from era_vllm_server.middleware import body as bounds
from tests.server.attacker import DEADLINE_S, KEYS, Pair
from tests.server.attacks import pictures

pytest_plugins = ["tests.server.guarded"]
ROUTES = {
    "chat": ("post", "/v1/chat/completions"),
    "responses": ("post", "/v1/responses"),
    "messages": ("post", "/v1/messages"),
    "completions": ("post", "/v1/completions"),
    "batch": ("post", "/v1/chat/completions/batch"),
    "tokenize": ("post", "/tokenize"),
    "invocations": ("post", "/invocations"),
    "inspect": ("post", "/v1/era/inspect"),
    "era": ("get", "/v1/era"),
    "ready": ("get", "/ready"),
}
LOADTEST = Path(__file__).parents[2] / "deploy" / "loadtest"
GAP_S, MEMORY_MIB = 5.0, 700
EXAMPLES = int(os.environ.get("FUZZ", "25"))
NOT_OURS = frozenset({501, 503})
"""5xx that are no fault: a feature that vLLM does not have, and admission."""
MOST_LATE = 2
"""Requests of a route that may be over the deadline once: what is slow by its body is so often."""
REFUSAL = {"type": "refusal", "refusal": "no"}
MESSAGE = {"type": "message", "role": "assistant", "id": "1", "status": "completed"}
VLLMS_OWN = {
    "'ResponseOutputRefusal' object has no attribute 'text'": (
        "/v1/responses",
        {"input": [{**MESSAGE, "content": [REFUSAL]}]},
    ),
    "list index out of range": ("/v1/responses", {"input": [{**MESSAGE, "content": []}]}),
}
"""Texts of 500s that stock vLLM 0.32.0 gives as well, and a body for each."""
SHORT = {"n": 1, "max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4}
TYPES = ["input_image", "image", "image_pil", "video_url"]
GRAMMARS = frozenset({"response_format", "structured_outputs", "tool_choice", "text"})
LENGTH = {"responses": "max_output_tokens"}

words = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
junk = st.recursive(
    words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
levels = st.sampled_from(["off", "light", "medium", "strong", "extreme", "none", ""])
eras = st.one_of(
    st.fixed_dictionaries({"pruning_rate": st.floats() | st.sampled_from([0, 0.5, 0.95, 1, -1])}),
    st.fixed_dictionaries({"level": levels}),
    junk,
)
urls = st.sampled_from([url for name, url in pictures().items() if name != "surrogate"])
details = st.sampled_from(["auto", "low", "high", "original", "", "LOW"]) | junk
images = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["image_url"] * 9 + ["input_image", "image", "image_pil", "video_url"]
        )
    },
    optional={
        "image_url": st.one_of(
            st.fixed_dictionaries(
                {"url": urls | st.text(max_size=30)}, optional={"detail": details}
            ),
            urls,
            junk,
        ),
        "uuid": st.text(max_size=9) | junk,
        "image_pil": junk,
    },
)
SECRET = "a client's own words"
texts = st.fixed_dictionaries(
    {"type": st.just("text"), "text": st.just(SECRET) | st.text(max_size=40)}
)
own = st.fixed_dictionaries({}, optional={"era": eras, "detail": details, "image_url": junk})
owned = st.tuples(images | texts, own).map(lambda two: two[0] | two[1])
"""Parts that say something of their own."""
roles = st.sampled_from(["user", "user", "user", "system", "assistant", "tool", "nobody"])
contents = st.lists(images | texts | owned, min_size=1, max_size=4) | st.text(max_size=40) | junk
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), max_size=3)
chats = st.fixed_dictionaries(
    {"model": st.just("era-sample"), "messages": messages | junk},
    optional={"era": eras, "stream": st.booleans()},
)


batches = st.fixed_dictionaries(
    {"model": st.just("era-sample"), "messages": st.lists(messages, max_size=3) | junk},
    optional={"era": junk},
)


@pytest.fixture(scope="module")
def schema(pair: Pair) -> Any:
    """The server's own description of its routes."""
    return schemathesis.openapi.from_dict(pair.ours.get("/openapi.json").json())


@pytest.fixture(scope="module")
def loadtest() -> Iterator[Any]:
    """``loadtest(name)``: a module of the load tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(LOADTEST)
        yield importlib.import_module


@pytest.fixture(scope="module", autouse=True)
def watched(pair: Pair, loadtest: Any) -> Iterator[None]:
    """The oracle beside "no 500": whatever is sent, /health answers, and memory stays.

    Wide bounds, for a machine that does other things; ``deploy/loadtest/bodies.py`` measures.
    """
    assert pair.alive()
    probe = loadtest("probe").Probe(pair.server.port, pair.server.pid, 6000)
    try:
        with probe.watching() as sample:
            yield
    finally:
        probe.close()
    print(f"longest gap in /health {sample.gap_s:.2f} s, {sample.mib:.0f} MiB over the base")
    assert not sample.ended and sample.gap_s < GAP_S and sample.mib < MEMORY_MIB


@pytest.fixture(scope="module")
def answers() -> Iterator[Counter[tuple[str, int]]]:
    """How often each route answered what; printed, so that one sees what was reached."""
    found: Counter[tuple[str, int]] = Counter()
    yield found
    for (path, status), count in sorted(found.items()):
        print(f"{path} {status}: {count}")


def check(
    pair: Pair, answers: Counter[tuple[str, int]], method: str, path: str, body: object
) -> None:
    """Send one, and see that the server lives on."""
    try:
        text = json.dumps(body)
    except TypeError:  # a file
        return
    headers = {"Content-Type": "application/json"}

    def ask(client: httpx.Client) -> httpx.Response:
        try:
            return client.request(
                method, path, content=text.encode(), headers=headers, timeout=DEADLINE_S + 30
            )
        except httpx.TimeoutException:
            pytest.fail(f"{path} hangs at {text[:500]}")

    reply = ask(pair.ours)
    if reply.status_code == 504:  # by the body, or by what else the machine does?
        print(f"{path} took longer than the deadline, and is asked again: {text}")
        answers[path, 504] += 1
        assert answers[path, 504] <= MOST_LATE, f"{path} is late too often, now at {text[:800]}"
        reply = ask(pair.ours)
    answers[path, reply.status_code] += 1
    fine = reply.status_code < 500 or reply.status_code in NOT_OURS
    fine |= any(known in reply.text for known in VLLMS_OWN)
    if not fine:  # on stock vLLM too?
        stock = ask(pair.stock)
        fine = stock.status_code == reply.status_code
        print(f"{path}: stock answers {stock.status_code} too, to {text[:300]}")
    assert fine, f"{path} answers {reply.status_code} {reply.text[:300]} to {text[:800]}"
    assert '"code": 500' not in reply.text, f"{path} streams {reply.text[-300:]} to {text[:800]}"
    assert pair.ours.get("/health").status_code == 200


def nested(deep: int, where: str) -> bytes:
    """Return a chat with lists in lists in one of its fields."""
    lists = "[" * deep + "]" * deep
    return f'{{"model": "era-sample", "messages": [], "{where}": {lists}}}'.encode()


def run(strategy: st.SearchStrategy[Any], send: Any, examples: int = EXAMPLES) -> None:
    """Draw examples and send each."""
    phases = (Phase.generate, Phase.shrink) if examples > 100 else (Phase.generate,)
    limits = settings(
        max_examples=examples,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    limits(given(strategy)(send))()


def short(body: object, name: str) -> object:
    """Return a body that asks for little: how long the model writes is not the question.

    Nor what it can write: JSON it cannot, and in a grammar none of whose tokens it has vLLM ends
    the request with a 500, stock or not.
    """
    if not isinstance(body, dict):
        return body
    body = {name: value for name, value in body.items() if name not in GRAMMARS}
    asked = {**body, LENGTH.get(name, "max_tokens"): 4}
    return asked | {name: value for name, value in SHORT.items() if name in body}


@pytest.mark.parametrize("name", ROUTES)
def test_bodies_by_the_description(pair: Pair, schema: Any, answers: Any, name: str) -> None:
    method, path = ROUTES[name]
    operation = schema[path][method]

    def send(case: Any) -> None:
        body = case.body if operation.body else None
        check(pair, answers, method, path, short(body, name))

    run(operation.as_strategy(), send)
    assert pair.alive()


def test_every_other_route_by_the_description(pair: Pair, schema: Any, answers: Any) -> None:
    """So that a route which is new is tried too."""
    known = {path for _, path in ROUTES.values()}
    described = json.loads(pair.ours.get("/openapi.json").text)["paths"]
    others = [(path, how) for path, how in described.items() if "{" not in path]
    tried = [
        path for path, how in others if path not in known and "requestBody" in how.get("post", {})
    ]
    assert tried
    for path in tried:
        operation = schema[path]["post"]
        run(operation.as_strategy(), sender(pair, answers, path), max(EXAMPLES // 5, 5))
    assert pair.alive()


def sender(pair: Pair, answers: Counter[tuple[str, int]], path: str) -> Any:
    """Return what sends a case to a route."""

    def send(case: Any) -> None:
        check(pair, answers, "post", path, short(case.body, "chat"))

    return send


def test_bodies_that_grow_are_within_the_bounds_or_refused(pair: Pair, loadtest: Any) -> None:
    """A seed of ``deploy/loadtest/bodies.py``: what passes holds no more than the bounds say."""
    openapi = json.loads(pair.ours.get("/openapi.json").text)
    grown = list(loadtest("growth").bodies(openapi, [300_000]))
    assert len(grown) > 1000
    layer = bounds.Body(lambda *_: None, frozenset(), "era", False, lambda: ("image",))
    refused = 0
    for body in random.Random(0).sample(grown, 300):
        asgi = {"type": "http", "path": body.path, "headers": []}
        data = body.encode()
        found = layer._check(asgi, data)
        refused += found is not None
        if found is None:
            lists = [value for _, value in walk("", json.loads(data)) if isinstance(value, list)]
            objects = [value for _, value in walk("", json.loads(data)) if isinstance(value, dict)]
            assert len(objects) <= bounds.MAX_OBJECTS, body
            assert all(len(value) <= bounds.MAX_MEMBERS for value in objects), body
            others = [value for value in lists if {type(item) for item in value} != {int}]
            assert sum(map(len, others)) <= bounds.MAX_ITEMS, body
    assert 100 < refused < 300


def walk(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield every value of a body."""
    yield name, value
    inner = value.items() if isinstance(value, dict) else ()
    inner = ((name, item) for item in value) if isinstance(value, list) else inner
    for at, item in inner:
        yield from walk(at, item)


def test_chats_with_pictures(pair: Pair, schema: Any, answers: Any) -> None:
    """Ours alone, and over what the description allows in all other fields."""
    method, path = ROUTES["chat"]
    run(chats, lambda body: check(pair, answers, method, path, short(body, "chat")))
    operation = schema[path][method]

    def send(pair_of: Any) -> None:
        case, ours = pair_of
        theirs = case.body if isinstance(case.body, dict) else {}
        check(pair, answers, method, path, short(theirs | ours, "chat"))

    run(st.tuples(operation.as_strategy(), chats), send)
    assert pair.alive()
    assert answers[path, 200] > 0 < answers[path, 400]


@pytest.mark.parametrize(
    ("name", "bodies"), [("batch", batches), ("tokenize", chats), ("invocations", chats)]
)
def test_chats_on_other_routes(
    pair: Pair, answers: Any, name: str, bodies: st.SearchStrategy[Any]
) -> None:
    method, path = ROUTES[name]
    run(bodies, lambda body: check(pair, answers, method, path, short(body, "chat")))
    assert pair.alive()


@pytest.mark.parametrize("text", VLLMS_OWN)
def test_faults_of_vllm_itself(pair: Pair, text: str) -> None:
    """Left alone; a row goes when vLLM has mended it."""
    path, body = VLLMS_OWN[text]
    for client in (pair.stock, pair.ours):
        reply = client.post(path, json={"model": "era-sample", **body})
        assert (reply.status_code, text in reply.text) == (500, True), reply.text


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b"{" * 100_000, b'{"messages":' * 1000, b"1" * 5000]
    + [nested(deep, where) for deep in (400, 4000, 40_000) for where in ("messages", "era")],
    ids=lambda body: f"{body[:12]!r} of {len(body)}",
)
def test_bodies_that_no_client_would_write(pair: Pair, body: bytes) -> None:
    described = json.loads(pair.ours.get("/openapi.json").text)["paths"]
    posts = {("post", path) for path, how in described.items() if "post" in how and "{" not in path}
    for method, path in sorted(posts | set(ROUTES.values())):
        for kind in ("application/json", "text/plain", "multipart/form-data", ""):
            headers = {"Content-Type": kind, "Authorization": f"Bearer {KEYS[1]}"}
            reply = pair.ours.request(method, path, content=body, headers=headers)
            said = f"{path} {kind}: {reply.status_code} {reply.text[:200]}"
            if reply.status_code >= 500:  # vLLM's own, where stock says so too
                print(said)
                headers["Authorization"] = f"Bearer {KEYS[0]}"
                stock = pair.stock.request(method, path, content=body, headers=headers)
                assert stock.status_code >= 500, said
    assert pair.ours.get("/health").status_code == 200


def test_the_log_holds_nothing_that_was_sent(pair: Pair) -> None:
    """After all that is refused or fails above."""
    log = pair.server.log.read_text(encoding="utf-8", errors="replace")
    for said in (SECRET, "iVBORw0KGgo", *KEYS):  # a PNG in base64 begins so
        lines = [line for line in log.splitlines() if said in line]
        assert not lines, f"{said}: {lines[0][:500]}"
