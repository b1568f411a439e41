"""Every answer says which request it is of, and every error has the form of its API and an end."""

import asyncio
import json

import anthropic
import httpx
import openai
import pytest

from era_vllm_server.middleware.errors import MAX_BYTES, Reply, error_body
from tests.server.asking import (
    CHAT,
    MESSAGES,
    MODEL,
    RESPONSES,
    chat_body,
    fresh,
    messages_body,
    picture,
    post,
)
from tests.server.test_fuzz import VLLMS_OWN

COUNT, INSPECT = f"{MESSAGES}/count_tokens", "/v1/era/inspect"
ROUTES = [
    *(CHAT, RESPONSES, MESSAGES, COUNT, INSPECT, f"{CHAT}/batch", "/v1/completions", "/tokenize"),
    *("/detokenize", "/invocations", "/inference/v1/generate", "/generative_scoring", "/nowhere"),
]
LARGE = "nope" * 200_000
CHAT_OF_ALL = {**chat_body(text="?"), "prompt": "?", "input": "?"}
BAD = {
    "empty": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "other types": b'{"model": 1, "messages": 3, "prompt": {"a": 1}, "input": 3}',
    "another model": json.dumps(CHAT_OF_ALL | {"model": "nope"}).encode(),
    "a long model": json.dumps(CHAT_OF_ALL | {"model": LARGE}).encode(),
    "a long level": json.dumps(CHAT_OF_ALL | {"era": {"level": LARGE}}).encode(),
    "a long key": json.dumps(CHAT_OF_ALL | {"messages": [{LARGE: 1}]}).encode(),
    "a long grammar": json.dumps(
        CHAT_OF_ALL
        | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 1}}}
        | {"structured_outputs": {"json": {"type": LARGE}}}
    ).encode(),
    "half a character": b'{"stop": "\\ud800"}',
    "a name": json.dumps(chat_body(picture(fresh(0, 7001), uuid="cat"))).encode(),
    "capitals": b'{"ERA": {"level": "off"}}',
}


def formed(reply, path):
    """Tell whether an error is of a form that the path's clients read."""
    said = reply.json()
    wanted = {"type", "error"} if f"{path}/".startswith(f"{MESSAGES}/") else {"error"}
    fields = {"message", "type"} | (set() if "type" in wanted else {"param", "code"})
    assert reply.headers["content-type"] == "application/json"
    assert said.keys() == wanted and said["error"].keys() == fields, reply.text
    assert said.get("type", "error") == "error"
    assert said["error"].get("code", reply.status_code) == reply.status_code
    return len(reply.content) <= MAX_BYTES and bool(said["error"]["message"])


@pytest.mark.parametrize("path", ROUTES)
def test_every_error_has_the_form_of_its_api_a_length_and_an_id(servers, path):
    url = f"{servers[0].url}{path}"
    json_type = {"Content-Type": "application/json"}
    replies = [
        httpx.post(url, content=body, headers=json_type, timeout=60) for body in BAD.values()
    ]
    replies += [httpx.post(url, content=b"x"), httpx.get(url), httpx.put(url), httpx.options(url)]
    failed = [reply for reply in replies if reply.status_code != 200]
    assert len(failed) > len(replies) // 2
    for reply in failed:
        assert reply.status_code >= 400 and formed(reply, path), reply.text[:300]
        assert len(reply.headers["x-request-id"]) == 32
    assert len({reply.headers["x-request-id"] for reply in replies}) == len(replies)


def test_an_error_that_vllm_does_not_catch_is_one_too(servers):
    for text, (path, body) in VLLMS_OWN.items():
        headers = {"X-Request-Id": "mine"}
        reply = httpx.post(f"{servers[0].url}{path}", json=body, headers=headers, timeout=60)
        assert (reply.status_code, text in reply.text) == (500, True)
        assert formed(reply, path) and reply.headers["x-request-id"] == "mine"


def test_the_id_of_a_request_comes_back_and_is_in_vllms_own(servers):
    bodies = {
        CHAT: chat_body(picture(fresh(0, 7002))),
        MESSAGES: messages_body(fresh(0, 7003), stream=True),
        "/v1/models": None,
        "/health": None,
        "/nowhere": None,
    }
    for path, body in bodies.items():
        method = "GET" if body is None else "POST"
        for given, same in (("a-1:b.c_d", True), ("a b", False), ("x" * 129, False), (None, False)):
            headers = {} if given is None else {"X-Request-Id": given}
            url = f"{servers[0].url}{path}"
            reply = httpx.request(method, url, json=body, headers=headers, timeout=60)
            (found,) = reply.headers.get_list("x-request-id")
            assert found == given if same else len(found) == 32, path
            assert body is None or f"chatcmpl-{found}" in reply.text


def test_clients_read_errors_of_all_kinds(servers):
    ours = {"base_url": servers[0].url, "api_key": "none", "max_retries": 0}
    messages = anthropic.Anthropic(**ours).messages
    body = messages_body(fresh(0, 7004))
    del body["temperature"]
    for change, kind in (
        ({"max_tokens": -1}, anthropic.BadRequestError),
        ({"extra_body": {"era": {"level": "x"}}}, anthropic.BadRequestError),
        ({"extra_body": {"ERA": 1}}, anthropic.BadRequestError),
        ({"model": LARGE}, anthropic.NotFoundError),
    ):
        with pytest.raises(kind) as raised:
            messages.create(**body | change)
        assert raised.value.body["error"]["message"] and len(raised.value.body) == 2
    completions = openai.OpenAI(**ours | {"base_url": f"{servers[0].url}/v1"}).chat.completions
    with pytest.raises(openai.NotFoundError) as raised:
        completions.create(model=LARGE, messages=[{"role": "user", "content": "?"}])
    assert raised.value.param == "model" and "... (cut)" in raised.value.message
    assert post(servers[0], CHAT, chat_body(text="?", model=MODEL)).status_code == 200


LONG = "\x07é" * 2**20
OPENAI = {"error": {"message": "m", "type": "t", "param": None, "code": 400}}
ANTHROPIC = {"type": "error", "error": {"type": "t", "message": "m"}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "Not Found"),
        (b"plain", "plain"),
        (b'"json"', "json"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]'),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"error": {"code": 3}}', "Not Found"),
        (json.dumps(OPENAI).encode(), "m"),
        (json.dumps(ANTHROPIC).encode(), "m"),
        (json.dumps({"error": {"message": LONG, "type": LONG, "param": LONG}}).encode(), None),
        (json.dumps({"type": "error", "error": {"message": LONG, "type": LONG}}).encode(), None),
        (json.dumps({"detail": LONG}).encode(), None),
        (LONG.encode(), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_error_has_the_form_of_its_api_and_an_end(body, message):
    for theirs in (False, True):
        found = error_body(body, 404, anthropic=theirs)
        said = json.loads(found)
        assert len(found) <= MAX_BYTES
        assert set(said) == ({"type", "error"} if theirs else {"error"})
        assert set(said["error"]) >= {"type", "message"}
        told = said["error"]["message"]
        assert told == message if message is not None else told.endswith("... (cut)")
    same = error_body(json.dumps(OPENAI).encode(), 400, anthropic=False)
    assert same == json.dumps(OPENAI).encode()
    assert error_body(b'{"ready":false}', 503, anthropic=False) == b'{"ready":false}'


def test_an_error_that_breaks_off_is_followed_by_one_that_is_whole():
    sent = []

    async def send(message):
        sent.append(message)

    async def go():
        reply = Reply(send, anthropic=False)
        for status, part, more in ((404, b'{"detail":', True), (500, b"broken", False)):
            await reply({"type": "http.response.start", "status": status, "headers": []})
            assert not reply.started and not sent
            await reply({"type": "http.response.body", "body": part, "more_body": more})
        assert reply.started

    asyncio.run(go())
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"]["message"] == "broken"
    assert dict(sent[0]["headers"])[b"content-length"] == b"%d" % len(sent[1]["body"])
