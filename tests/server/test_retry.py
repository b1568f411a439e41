"""A picture that vLLM's server believes its engine to have: the next request with it is answered.

Each picture is first sent with a sampling parameter that is refused after pictures have been
processed: so one client's mistake is, in stock vLLM, the next client's internal error.
"""

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from vllm.exceptions import RetryableRequestError

from era_vllm.vllm_plugin.renderer import RENDER
from era_vllm_server.retry import retry_missed_pictures
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
from tests.server.attacker import Pair, metric

pytest_plugins = ["tests.server.guarded"]


def chat(image, **options):
    return chat_body(picture(image), **options)


def batch(image):
    asked = chat(image)
    return {**asked, "messages": [asked["messages"]]}


ROUTES = {
    "chat": (CHAT, chat, {}),
    "chat, two answers": (CHAT, chat, {"n": 2, "temperature": 0.01}),
    "chat, streamed": (CHAT, chat, {"stream": True}),
    "responses": (RESPONSES, responses_body, {}),
    "responses, streamed": (RESPONSES, responses_body, {"stream": True}),
    "messages": (MESSAGES, messages_body, {}),
    "messages, streamed": (MESSAGES, messages_body, {"stream": True}),
    "invocations": ("/invocations", chat, {}),
    "batch": (f"{CHAT}/batch", batch, {}),
}


@pytest.mark.parametrize("name", ROUTES)
def test_a_request_that_misses_its_picture_is_answered(pair: Pair, name: str) -> None:
    path, body, more = ROUTES[name]
    image = fresh(0, 500 + list(ROUTES).index(name))

    def answered(client: httpx.Client) -> bool:
        """Ask about a picture that the API server takes for sent, and the engine has not got."""
        refused = client.post(CHAT, json=chat(image, logit_bias={"99999999": 1}))
        assert refused.status_code == 400, refused.text
        try:
            reply = client.post(path, json={**body(image), **more})
        except httpx.RemoteProtocolError:  # a stream that is cut
            return False
        assert reply.status_code in (200, 500), reply.text
        return reply.status_code == 200 and "triangle" in reply.text

    assert not answered(pair.stock)
    before = metric(pair.ours, "era:images_total")
    assert answered(pair.ours)
    assert metric(pair.ours, "era:images_total") == before + 1
    # both know the picture by now
    assert pair.stock.post(path, json={**body(image), **more}).status_code == 200
    assert pair.ours.post(path, json={**body(image), **more}).status_code == 200


def engine(*finished):
    """An engine client whose requests end so at once, one after another; and what was asked."""
    asked = []

    async def generate(prompt, sampling_params, request_id):
        asked.append(prompt)
        reason = finished[len(asked) - 1]
        said = SimpleNamespace(finish_reason=reason, token_ids=[7] if reason == "stop" else [])
        yield SimpleNamespace(outputs=[said])

    client = SimpleNamespace(generate=generate)
    retry_missed_pictures(client)
    return client, asked


def ends(client, prompt):
    """What a prompt's outputs end with."""

    async def read():
        outputs = [output async for output in client.generate(prompt, None, "id")]
        return [output.outputs[0].finish_reason for output in outputs]

    return asyncio.run(read())


def test_what_cannot_be_rendered_anew_is_told_to_come_again():
    """Beam search's prompts, and those of large pictures; forced, no server runs."""
    client, asked = engine("error")
    with pytest.raises(RetryableRequestError):
        ends(client, {"mm_kwargs": {"image": [None]}})
    assert len(asked) == 1


def test_a_picture_that_is_missed_each_time_is_told_to_come_again():
    def prompt(pixels):
        async def render():
            return {"mm_kwargs": {"image": [pixels]}}

        return {"mm_kwargs": {"image": [None]}, RENDER: render}

    client, asked = engine(*["error"] * 9)
    with pytest.raises(RetryableRequestError):
        ends(client, prompt(None))
    assert len(asked) == 3
    client, asked = engine("error", "error")  # with its pixels it misses nothing
    assert ends(client, prompt("pixels")) == ["error"]
    assert len(asked) == 2
    client, asked = engine("error", "stop")
    assert ends(client, prompt("pixels")) == ["stop"]
    client, asked = engine("error")
    assert ends(client, {"mm_kwargs": {"image": ["pixels"]}}) == ["error"]
    assert len(asked) == 1
