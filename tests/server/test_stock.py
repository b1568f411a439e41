"""Beside the ``era`` object an answer is what a stock vLLM server sends, byte for byte.

Pruning off, so that both engines have the same tokens to say the same about.
"""

import json
import re

import httpx
import pytest

from tests.server.asking import (
    CHAT,
    MESSAGES,
    RESPONSES,
    chat_body,
    fresh,
    messages_body,
    picture,
    responses_body,
)
from tests.server.attacker import MAX_BODY, Pair

pytest_plugins = ["tests.server.guarded"]
OFF = {"era": {"level": "off"}}
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
TOOLS = {"tools": [{"type": "function", "function": WEATHER}], "tool_choice": "none"}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
BODIES = {
    "chat": (CHAT, lambda image: chat_body(picture(image), **TOOLS)),
    "chat, streamed": (CHAT, lambda image: chat_body(picture(image), **TOOLS, **USAGE)),
    "chat, refused": (CHAT, lambda image: chat_body(picture(image), top_logprobs=-1)),
    "responses": (RESPONSES, responses_body),
    "responses, streamed": (RESPONSES, lambda image: responses_body(image, stream=True)),
    "responses, refused": (RESPONSES, lambda image: responses_body(image, temperature="hot")),
    "messages": (MESSAGES, messages_body),
    "messages, streamed": (MESSAGES, lambda image: messages_body(image, stream=True)),
    "messages, refused": (MESSAGES, lambda image: messages_body(image) | {"max_tokens": -1}),
}
OBJECT = re.compile(r',"era":\{"policy":"[a-z]+","images":\[[^]]*\]\}')
OWN = "id|item_id|created|created_at|completed_at|system_fingerprint"
"""What every answer has for itself, and a hash of the engine's settings."""
VOLATILE = re.compile(rf'("(?:{OWN})":)("[\w.-]+"|[\d.]+)')


@pytest.mark.parametrize("name", BODIES)
def test_the_answer_is_stocks_byte_for_byte(pair: Pair, name: str) -> None:
    path, body = BODIES[name]
    asked = body(fresh(0, 700 + list(BODIES).index(name)))

    def masked(text: str) -> str:
        return VOLATILE.sub(r"\1", OBJECT.sub("", text))

    for _ in range(3):  # of a stream, vLLM joins words that wait in one event: as time has it
        stock = pair.stock.post(path, json=asked)
        ours = pair.ours.post(path, json={**asked, **OFF})
        said = masked(stock.text)
        if masked(ours.text) == said:
            break
    if name == "messages, refused":  # in OpenAI's form, which Anthropic's clients do not read
        error = {name: stock.json()["error"][name] for name in ("message", "type")}
        said = json.dumps({"type": "error", "error": error})
    assert (ours.status_code, masked(ours.text)) == (stock.status_code, said)
    assert (stock.status_code == 200) != ("refused" in name)
    assert bool(OBJECT.search(ours.text)) == (stock.status_code == 200)
    assert kinds(ours) == kinds(stock)


def kinds(reply: httpx.Response) -> dict[str, str]:
    """Return the headers that say what an answer is."""
    volatile = {"date", "content-length", "x-request-id"}
    return {name: value for name, value in reply.headers.items() if name not in volatile}


def test_refusals_have_the_form_of_their_api_and_an_id(pair: Pair) -> None:
    asked = messages_body(fresh(0, 799))
    large = {**asked, "system": "x" * MAX_BODY}
    for path in (MESSAGES, CHAT):
        for headers, body, status in (
            ({"Authorization": "Bearer nobody's"}, asked, 401),
            ({}, large, 413),
        ):
            reply = pair.ours.post(path, json=body, headers={**headers, "X-Request-Id": "mine"})
            said = reply.json()
            assert (reply.status_code, reply.headers["x-request-id"]) == (status, "mine")
            assert said["error"]["message"] and (said.get("type") == "error") == (path == MESSAGES)
            assert ("code" in said["error"]) == (path == CHAT)
