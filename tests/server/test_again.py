"""A picture that vLLM's server believes its engine to have: the next request with it is answered.

Each picture is first sent with a sampling parameter that is refused after pictures have been
processed: so one client's mistake is, in stock vLLM, the next client's internal error.
"""

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
