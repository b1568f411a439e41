"""Pictures that are pruned for what is asked of them, over HTTP: what is shared, said and refused.

The same through every route that takes pictures: the question is the user's text.
"""

import base64

import httpx
import pytest

from tests.server.asking import (
    CHAT,
    MESSAGES,
    RESPONSES,
    chat,
    chat_body,
    fresh,
    messages_body,
    picture,
    post,
    responses_body,
    settled,
    url_of,
)
from tests.server.conftest import LIMITS, SERVE, started

RED, MANY = "what shape is red?", "how many triangles?"
ENCODED, PREFIX = "era:reduced_images_total", "vllm:prefix_cache_hits_total"
OFF = {"question_aware": False}
LIGHT = {"level": "light"}


@pytest.fixture(scope="module")
def asking(tmp_path_factory):
    """A server that prunes for questions."""
    words = ["--era-question-aware", "--era-policy", "dpp", "--era-option", "relevance_weight=0.25"]
    words += ["--block-size", "32"]
    commands = {"asking": ([*SERVE, "serve", *LIMITS, *words], {})}
    with started(tmp_path_factory.mktemp("asking"), commands) as (server,):
        yield server


def tokens_of(answer):
    return [one["question_tokens"] for one in answer["era"]["images"]]


def counted(server, do):
    """What is done, and what was encoded and found in the KV cache for it."""
    before = settled(server, ENCODED, PREFIX)
    done = do()
    after = settled(server, ENCODED, PREFIX)
    return done, after[ENCODED] - before[ENCODED], after[PREFIX] - before[PREFIX]


def test_an_entry_for_each_question_and_one_for_all_who_do_not_ask(asking):
    image = fresh(0, 4001)

    def ask(text, **era):
        return lambda: chat(asking, picture(image), text=text, era={**LIGHT, **era})

    answer, encoded, found = counted(asking, ask(RED))
    assert (tokens_of(answer), encoded, found) == ([5], 1, 0)
    _, encoded, found = counted(asking, ask(MANY))
    assert (encoded, found) == (1, 0), "two questions share nothing"
    _, encoded, found = counted(asking, ask(RED))
    assert encoded == 0 and found >= 32, "the same one all"
    answer, encoded, _ = counted(asking, ask(RED, **OFF))
    assert (tokens_of(answer), encoded) == ([0], 1)
    _, encoded, found = counted(asking, ask(MANY, **OFF))
    assert encoded == 0 and found >= 32


def test_later_turns_find_the_picture_of_the_first(asking):
    body = chat_body(picture(fresh(1, 4002)), text=RED, era=LIGHT)
    first, encoded, _ = counted(asking, lambda: post(asking, CHAT, body).json())
    said = first["choices"][0]["message"]["content"]
    body["messages"] += [
        {"role": "assistant", "content": said},
        {"role": "user", "content": MANY},
    ]
    answer, again, found = counted(asking, lambda: post(asking, CHAT, body).json())
    assert (encoded, again, tokens_of(answer)) == (1, 0, [5]) and found >= 32


def test_every_route_asks_what_the_user_does(asking):
    image = fresh(2, 4003)
    bodies = {
        CHAT: chat_body(picture(image), text=RED, era=LIGHT),
        RESPONSES: responses_body(image, era=LIGHT),
        MESSAGES: messages_body(image, era=LIGHT),
    }
    before = settled(asking, ENCODED)[ENCODED]
    for path, body in bodies.items():
        reply = post(asking, path, body)
        assert reply.status_code == 200, reply.text
        assert tokens_of(reply.json()) == [5], path
    assert settled(asking, ENCODED)[ENCODED] == before + 1, "one entry for the three"


def test_inspect_draws_what_a_question_keeps(asking):
    image = fresh(3, 4004)

    def inspect(**more):
        body = {"image_url": {"url": url_of(image)}, "picture": False, "era": LIGHT, **more}
        reply = httpx.post(f"{asking.url}/v1/era/inspect", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        return reply.json()["segments"][0]["anchors"]

    nothing, red, many = inspect(), inspect(question=RED), inspect(question=MANY)
    assert len({str(one) for one in (nothing, red, many)}) == 3
    assert inspect(question=RED) == red and inspect(question="") == nothing


@pytest.mark.parametrize(
    ("era", "said"),
    [
        ({"question_aware": "no"}, "era.question_aware: got 'no', allowed: true or false"),
        ({"question_aware": False, "rate": 0.5}, "unknown field"),
        ({"image": {"question_aware": False}}, "unknown field 'question_aware'"),
    ],
)
def test_what_is_refused(asking, era, said):
    reply = post(asking, CHAT, chat_body(picture(fresh(4, 4005)), era=era))
    assert reply.status_code == 400 and said in reply.json()["error"]["message"]


def test_a_server_that_does_not_ask_says_so(servers):
    image = fresh(4, 4006)
    reply = post(servers[0], CHAT, chat_body(picture(image), era={"question_aware": True}))
    assert reply.status_code == 400
    message = "era.question_aware: got True, allowed: false, or an engine that was started with"
    assert reply.json()["error"]["message"].startswith(message)
    answer = chat(servers[0], picture(image), era={**OFF, **LIGHT})
    (one,) = answer["era"]["images"]
    assert one["level"] == "light" and "question_tokens" not in one
    body = {"image_url": {"url": url_of(image)}, "question": RED}
    reply = httpx.post(f"{servers[0].url}/v1/era/inspect", json=body, timeout=120)
    assert reply.status_code == 400 and "question: got 'what shape is red?'" in reply.text


def test_what_is_asked_stands_in_no_log_and_no_metric(asking):
    word = "zebra" + base64.b32encode(b"secret").decode().lower().rstrip("=")
    chat(asking, picture(fresh(5, 4007)), text=f"is there a {word}?")
    metrics = httpx.get(f"{asking.url}/metrics", timeout=30).text
    assert word not in metrics and word not in asking.log.read_text(encoding="utf-8")
