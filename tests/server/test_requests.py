"""How much a request has pruned, and what the answer says of it, over HTTP with real clients."""

import asyncio
import json
import re
import time

import anthropic
import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI

from era_vllm.lab import CHECKPOINT
from tests.server.asking import (
    CHAT,
    MESSAGES,
    MODEL,
    QUESTION,
    RESPONSES,
    N,
    chat,
    chat_body,
    figures,
    fresh,
    image_tokens,
    messages_body,
    picture,
    post,
    rates,
    responses_body,
    settled,
    url_of,
)
from tests.server.conftest import LIMITS, SERVE, started

A, B, C = (fresh(sample, 2000 + sample) for sample in (3, 4, 5))
COUNT = f"{MESSAGES}/count_tokens"
KEYS = ("key-of-one-client", "key-of-another")
LEVELS = {"off": (0.0, 144), "light": (0.5, 72), "medium": (0.778, 32)} | {
    "strong": (0.889, 16),
    "extreme": (0.944, 8),
}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A server that prunes extremely, takes names of pictures and has keys; and one at 0."""
    folder = tmp_path_factory.mktemp("others")
    keys = folder / "keys"
    keys.write_text("\n".join(KEYS))
    levels = json.dumps({"off": 0, "strong": 0.97, "extreme": 0.944})
    extreme = {"ERA_PRUNING_RATE": "0.944", "ERA_LEVELS": levels, "ERA_API_KEYS_FILE": str(keys)}
    commands = {
        "extreme": ([*SERVE, "serve", *LIMITS, "--era-allow-image-uuid"], extreme),
        "stock": ([*SERVE, "serve", *LIMITS, "--era-max-pruning-rate", "0"], {}),
    }
    with started(folder, commands) as both:
        yield both


@pytest.fixture(scope="module")
def extreme(others):
    return others[0]


@pytest.fixture(scope="module")
def stock(others):
    return others[1]


def client(server, kind=OpenAI):
    return kind(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_three_pictures_of_one_request_have_a_detail_each(servers):
    answer = chat(servers[0], picture(A, "high"), picture(B, "low"), picture(C))
    assert answer["era"]["policy"] == "era"
    assert rates(answer) == [
        (0.0, "off", "detail", 144),
        (0.889, "strong", "detail", 16),
        (0.778, "medium", "default", 32),
    ]
    assert {one["tokens_before"] for one in answer["era"]["images"]} == {N}
    assert image_tokens(servers[0], answer) == 144 + 16 + 32


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_a_rate_for_all_pictures_without_a_detail(servers, level):
    rate, tokens = LEVELS[level]
    for field in ({"level": level}, {"pruning_rate": rate}):
        answer = chat(servers[0], picture(A), picture(B, "auto"), picture(C, "low"), era=field)
        low = (0.889, "strong", "detail", 16)
        assert rates(answer) == [*[(rate, level, "era", tokens)] * 2, low]
        assert image_tokens(servers[0], answer) == 2 * tokens + 16


LIGHT, EXTREME = {"level": "light"}, {"level": "extreme"}


def test_a_part_says_the_rate_of_its_own_picture(servers):
    """Before its detail, and that before the request's field; on the routes that take one."""
    own = (0.5, "light", "part", 72)
    said = [own, own, (0.0, "off", "detail", 144), (0.944, "extreme", "era", 8)]
    parts = [picture(A, era=LIGHT), picture(B, "high", era={"pruning_rate": 0.5})]
    parts += [picture(A, "high"), picture(C, "auto", era=None)]
    before = settled(servers[0], "era:images_total")["era:images_total"]
    answer = chat(servers[0], *parts, era=EXTREME)
    assert rates(answer) == said
    assert image_tokens(servers[0], answer) == 2 * 72 + 144 + 8
    assert settled(servers[0], "era:images_total")["era:images_total"] == before + 4
    part = r'era:images_total{source="part"} ([1-9]\d*)'
    metrics = httpx.get(f"{servers[0].url}/metrics", timeout=30).text
    assert int(float(re.search(part, metrics)[1])) >= 2
    for chosen in ({}, {"era": EXTREME}):
        count = post(servers[0], "/tokenize", chat_body(*parts, **chosen)).json()["count"]
        usage = chat(servers[0], *parts, **chosen)["usage"]
        assert count == usage["prompt_tokens"]
    body = responses_body(A, "high", era=EXTREME)
    body["input"][0]["content"][0]["era"] = LIGHT
    assert rates(post(servers[0], RESPONSES, body).json()) == [own]
    output = [{"type": "input_image", "image_url": url_of(C), "detail": "high", "era": LIGHT}]
    call = {"call_id": "1", "name": "look", "arguments": "{}", "type": "function_call"}
    answered = {"type": "function_call_output", "call_id": "1", "output": output}
    reply = post(servers[0], RESPONSES, {**body, "input": [*body["input"], call, answered]})
    assert rates(reply.json()) == [own, own]
    result = {"type": "tool_result", "tool_use_id": "1", "content": [block(C, era=LIGHT)]}
    content = [block(A, era=EXTREME, detail="high"), result, block(B), TEXT]
    body = {**messages_body(A), "messages": [{"role": "user", "content": content}]}
    reply = post(servers[0], MESSAGES, body).json()
    assert [one[1:3] for one in rates(reply)] == [
        *(("light", "part"), ("extreme", "part"), ("medium", "default"))
    ]
    only = {name: body[name] for name in ("model", "messages")}
    counted = post(servers[0], COUNT, only).json()
    assert counted["input_tokens"] == reply["usage"]["input_tokens"]


@pytest.mark.parametrize(
    ("field", "place", "said"),
    [
        ({"pruning_rate": 0.99}, ".pruning_rate", r"got 0.99, allowed: a number in \[0, 0.95\]"),
        ({"level": "max"}, ".level", r"got 'max', allowed: off \(0\), light"),
        ({"level": ["off"]}, ".level", r"got \['off'\], allowed: off"),
        ({"image": {"level": "off"}}, "", r"unknown field 'image'"),
        ({"level": "off", "pruning_rate": 0}, "", r'allowed: {"pruning_rate": number} or {"level"'),
        ({"pruning_rate": {"era": {"era": [[[0]]]}}}, ".pruning_rate", r"allowed: a number"),
        ({"pruning_rate": 10**300}, ".pruning_rate", r"got 1000+\.\.\.0+, allowed: a number"),
        *((junk, "", r'allowed: {"pruning_rate": number}') for junk in (0, "", [], {}, False)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_field_of_a_part_is_a_400_with_its_place_and_range(servers, field, place, said):
    responses, messages = responses_body(A), messages_body(A)
    responses["input"][0]["content"][0]["era"] = field
    messages["messages"][0]["content"][0]["era"] = field
    for path, body, at in (
        (CHAT, chat_body(picture(A), TEXT, picture(B, era=field)), "messages[0].content[2]"),
        ("/tokenize", chat_body(picture(B, era=field)), "messages[0].content[0]"),
        (RESPONSES, responses, "input[0].content[0]"),
        (MESSAGES, messages, "messages[0].content[0]"),
        (COUNT, {**messages}, "messages[0].content[0]"),
    ):
        reply = post(servers[0], path, body)
        assert reply.status_code == 400, path
        message = reply.json()["error"]["message"]
        assert message.startswith(f"{at}.era{place}: got ") and re.search(said, message), message
        assert len(message) < 300
        assert reply.json()["error"].get("param", f"{at}.era{place}") == f"{at}.era{place}"


def test_numbers_that_no_json_has_and_names_that_come_twice(servers):
    def ask(written):
        text = json.dumps(chat_body(picture(A, era="here"))).replace('"here"', written)
        headers = {"Content-Type": "application/json"}
        return httpx.post(f"{servers[0].url}{CHAT}", content=text, headers=headers, timeout=60)

    for number in ("NaN", "Infinity", "-Infinity", "1e999", "-1e-9", "9" * 600, "9" * 9000):
        reply = ask(f'{{"pruning_rate": {number}}}')
        assert reply.status_code == 400, (number, reply.text)
    reply = ask('{"level": "off"}, "era": {"level": "light"}')
    assert rates(reply.json()) == [(0.5, "light", "part", 72)]
    assert ask('{"level": "off"}, "era": {"level": "max"}').status_code == 400
    assert ask("[" * 99 + "]" * 99).status_code == ask("[" * 9999 + "]" * 9999).status_code == 400


def test_a_rate_without_a_name_is_custom(servers):
    answer = chat(servers[0], picture(A), era={"pruning_rate": 0.3})
    assert rates(answer) == [(0.3, None, "era", 101)]


BAD = [
    ({"pruning_rate": 0.96}, r"era.pruning_rate: got 0.96, allowed: a number in \[0, 0.95\]"),
    ({"pruning_rate": "0.5"}, r"era.pruning_rate: got '0.5', allowed: a number in"),
    ({"level": "max"}, r"era.level: got 'max', allowed: off .*extreme"),
    ({"level": "off", "pruning_rate": 0}, r"era: got .*pruning_rate.*level"),
    ([0.5], r"era: got \[0.5\], allowed"),
]


@pytest.mark.parametrize(("field", "said"), BAD, ids=str)
def test_a_bad_field_is_a_400_with_name_value_and_range(servers, field, said):
    bodies = {
        CHAT: chat_body(picture(A), era=field),
        RESPONSES: responses_body(A, era=field),
        MESSAGES: messages_body(A, era=field),
    }
    for path, body in bodies.items():
        for stream in (False, True):
            reply = post(servers[0], path, {**body, "stream": stream})
            assert reply.status_code == 400, path
            assert re.search(said, reply.json()["error"]["message"]), path


def test_on_every_other_route_the_field_is_a_400(servers):
    """Every route that vLLM's own app has here, listed or not, with a body that many would take."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([str(CHECKPOINT)])
    taking = {
        re.sub(r"\{[^}]*\}", "x", route.path)
        for route in build_app(arguments, ("generate",)).routes
        if getattr(route, "methods", None) and route.methods & {"POST", "PUT", "PATCH"}
    } - {CHAT, RESPONSES, MESSAGES, COUNT, "/tokenize"}
    assert taking >= {
        *("/v1/completions", "/v1/chat/completions/batch", "/detokenize", "/invocations"),
        "/inference/v1/generate",
    }
    for path in taking:
        body = chat_body(picture(A), prompt="?", era={"level": "off"})
        reply = post(servers[0], path, body)
        assert reply.status_code == 400, path
        assert f"era: got it for {path}" in reply.json()["error"]["message"]
    for path in taking | {CHAT, RESPONSES, MESSAGES, COUNT, "/tokenize", "/v1/era/inspect"}:
        for wrong in ({"extra_body": {"era": {"level": "off"}}}, {"ERA": 0}, {"level": "off"}):
            reply = post(servers[0], path, chat_body(picture(A), prompt="?", **wrong))
            assert reply.status_code == 400, path
            said = reply.json()["error"]["message"]
            assert 'put {"era": {"level": "strong"}} at the top level of the body' in said
    assert post(servers[0], CHAT, chat_body(text="?", extra_body={"top_k": 1})).status_code == 200


def test_details_count_where_prompts_are_only_counted(servers):
    counts = [
        post(servers[0], "/tokenize", chat_body(picture(A, detail))).json()["count"]
        for detail in ("high", "low")
    ]
    assert counts[0] - counts[1] == 144 - 16


@pytest.mark.parametrize("era", [None, {"level": "off"}, {"level": "strong"}], ids=str)
def test_a_count_is_the_prompts_at_the_same_level_and_nothing_is_kept_of_it(servers, era):
    image = fresh(2, 2200 + len(str(era)))
    chosen = {} if era is None else {"era": era}
    names = ("era:images_total", "era:reduced_images_total", "vllm:mm_cache_queries_total")
    before = settled(servers[0], *names)
    body = messages_body(image, **chosen)
    body["messages"][0]["content"].append({**body["messages"][0]["content"][0], "detail": "low"})
    only = {
        name: value for name, value in body.items() if name not in ("max_tokens", "temperature")
    }
    counted = post(servers[0], COUNT, only).json()
    parts = picture(image, "high"), picture(image)
    tokens = post(servers[0], "/tokenize", chat_body(*parts, **chosen)).json()
    assert settled(servers[0], *names) == before
    usage = post(servers[0], MESSAGES, body).json()["usage"]
    assert counted["input_tokens"] == usage["input_tokens"]
    usage = chat(servers[0], *parts, **chosen)["usage"]
    assert tokens["count"] == len(tokens["tokens"]) == usage["prompt_tokens"]
    for path, asked in ((COUNT, only), ("/tokenize", chat_body(*parts))):
        reply = post(servers[0], path, asked | {"era": {"level": "max"}})
        assert (reply.status_code, "era.level: got 'max'" in reply.text) == (400, True)
    assert post(servers[0], "/tokenize", {"prompt": "what", **chosen}).json()["count"]


@pytest.mark.parametrize(
    "more",
    [
        {"mm_processor_kwargs": {"era": [0.5]}},
        {"mm_processor_kwargs": {"size": {"height": 9, "width": 9}}},
        {"media_io_kwargs": {"image": {"image_mode": "L"}}},
    ],
    ids=str,
)
def test_a_clients_own_processor_arguments_stay_refused(servers, more):
    assert post(servers[0], CHAT, chat_body(picture(A), **more)).status_code == 400


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"truncate_prompt_tokens": 1}, "leave truncate_prompt_tokens out"),
        ({"stop": "\ud800"}, "half a character"),
        ({"request_id": "\ud800"}, "half a character"),
    ],
    ids=str,
)
def test_what_vllm_takes_for_its_own_fault_is_a_400(servers, more, said):
    body = json.dumps(chat_body(picture(A), **more)).encode()
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(f"{servers[0].url}{CHAT}", content=body, headers=headers, timeout=60)
    assert (reply.status_code, said in reply.text) == (400, True), reply.text


def test_names_of_pictures_are_refused_by_default(servers, stock):
    for server in (servers[0], stock):
        for path in (CHAT, "/invocations", "/tokenize"):
            reply = post(server, path, chat_body(picture(A, uuid="cat")))
            assert reply.status_code == 400
            assert "--era-allow-image-uuid" in reply.json()["error"]["message"]


def without_era(text):
    """An answer's bytes without the object, and with ids, times and keys of a cache masked."""
    bare = re.sub(r',"era":\{"policy":"era","images":\[[^]]*\]\}', "", text)
    return re.sub(r'("id":"|"created":)[\w-]+', r"\1", bare)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 2, "seed": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": 3},
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ],
    ids=str,
)
def test_the_rest_of_an_answer_is_vllms_byte_for_byte(servers, more):
    """``/invocations`` gives the same body to vLLM's own route function."""
    body = chat_body(picture(A), **more)
    ours, theirs = (post(servers[0], path, body) for path in (CHAT, "/invocations"))
    assert ours.status_code == theirs.status_code == 200
    assert '"era":' not in theirs.text
    assert without_era(ours.text) == without_era(theirs.text)
    assert ours.text.count('"era":') == (2 if "stream_options" in more else 1)
    volatile = {"date", "content-length", "x-request-id"}
    headers = [
        {k: v for k, v in reply.headers.items() if k not in volatile} for reply in (ours, theirs)
    ]
    assert headers[0] == headers[1]


def test_responses_say_it_too(servers):
    answers = client(servers[0]).responses
    body = responses_body(A, "low", extra_body={})
    whole = answers.create(**body)
    assert whole.era["images"][0]["tokens_after"] == 16
    assert whole.era["images"][0]["source"] == "detail"
    body = responses_body(A, extra_body={"era": {"level": "light"}})
    kinds = {}
    for event in answers.create(**body, stream=True):
        said = getattr(getattr(event, "response", None), "era", None)
        kinds[event.type] = said and said["images"][0]["tokens_after"]
    assert {kind for kind, tokens in kinds.items() if tokens} == {
        "response.created",
        "response.completed",
    }
    assert kinds["response.completed"] == 72
    with answers.stream(**body) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().era["images"][0]["level"] == "light"


def test_messages_say_it_too(servers):
    body = messages_body(A, era={"level": "strong"})
    whole = post(servers[0], MESSAGES, body).json()
    assert rates(whole) == [(0.889, "strong", "era", 16)]
    events = post(servers[0], MESSAGES, {**body, "stream": True}).text.split("\n\n")
    holders = [event for event in events if '"era":' in event]
    assert len(holders) == 1
    assert rates(json.loads(holders[0].partition("data: ")[2])["message"]) == rates(whole)


def block(image, **more):
    """A picture as messages hold it."""
    return {**messages_body(image)["messages"][0]["content"][0], **more}


def test_messages_have_a_detail_for_each_picture_in_the_prompts_order(servers, stock):
    """In which those of a tool's result come before the others of its message."""
    call = {"filters": [{"type": "video", "min": 3}], "pattern": "f.{0,2000}r"}  # JSON, no more
    use = {"type": "tool_use", "id": "1", "name": "look", "input": call}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [block(C, detail="high")]}
    said = [
        {"role": "user", "content": [block(A, detail="low"), {"type": "text", "text": "see"}]},
        {"role": "assistant", "content": [block(B, detail="auto"), use]},
        {"role": "user", "content": [block(A, detail="original"), result, block(B)]},
    ]
    body = {"model": MODEL, "max_tokens": 4, "messages": said}
    details = ["strong", "medium", "off", "off", "medium"]
    sources = ["detail", "default", "detail", "detail", "default"]
    tokens = [16, 32, 144, 144, 32]
    create = anthropic.Anthropic(base_url=servers[0].url, api_key="none", max_retries=0).messages
    answer = create.create(**body)
    found = [(one[1], one[2], one[3]) for one in rates({"era": answer.era})]
    assert found == list(zip(details, sources, tokens, strict=True))
    count = {name: value for name, value in body.items() if name != "max_tokens"}
    assert create.count_tokens(**count).input_tokens == answer.usage.input_tokens
    with create.stream(**body) as stream:
        assert stream.get_final_message().era == answer.era
    chosen = create.create(**body, extra_body={"era": {"level": "light"}})
    assert [one[1:] for one in rates({"era": chosen.era})] == [
        ("light", "era", 72) if one[2] == "default" else one[1:]
        for one in rates({"era": answer.era})
    ]
    clamped = [one["clamped"] for one in post(stock, MESSAGES, body).json()["era"]["images"]]
    assert clamped == [True, False, False, False, False]


TYPES = r'allowed: {"type": "base64", .*} or {"type": "url", .*}; send the picture itself'
TEXT = {"type": "text", "text": QUESTION}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"type": "image"}], r"source: got None, " + TYPES),
        ([{"type": "image", "source": {}}], r"source: got {}, " + TYPES),
        ([{"type": "image", "source": {"type": "file", "file_id": "f"}}], r"got .*file.*" + TYPES),
        ([{"type": "image", "source": {"type": "url"}}], r"source: got .*url.*" + TYPES),
        ([{"type": "image", "source": {"type": ["odd"], "data": "x"}}], TYPES),
        ([block(A, detail="odd")], r"detail: got 'odd', allowed: high, original, low, auto"),
        ([{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]}], TYPES),
    ],
    ids=str,
)
def test_an_image_block_that_cannot_be_used_is_a_400_that_says_what_can(servers, content, said):
    for path in (MESSAGES, COUNT):
        body = messages_body(A)
        body["messages"][0]["content"] = [*content, TEXT]
        reply = post(servers[0], path, body)
        assert reply.status_code == 400, reply.text
        assert reply.json()["type"] == "error"
        assert re.search(said, reply.json()["error"]["message"])


def test_pictures_where_vllm_looks_for_none_are_refused(servers):
    result = {"type": "tool_result", "tool_use_id": "1", "content": [block(A)]}
    user = {"role": "user", "content": "?"}
    for more in (
        {"system": [block(A)]},
        {"messages": [{"role": "system", "content": [block(A), TEXT]}, user]},
        {"messages": [user, {"role": "assistant", "content": [result]}, user]},
    ):
        reply = post(servers[0], MESSAGES, messages_body(A) | more)
        assert reply.status_code == 400, reply.text
        assert "allowed: in a message of the user" in reply.json()["error"]["message"]
    for part in ({"type": "input_image", "file_id": "f"}, {"type": "input_image"}):
        said = [{"role": "user", "content": [part, {"type": "input_text", "text": "?"}]}]
        reply = post(servers[0], RESPONSES, {"model": MODEL, "input": said})
        assert reply.status_code == 400
        assert "image_url: got None, allowed: data:image/" in reply.json()["error"]["message"]


OPTIONS = {
    "model": MODEL,
    "messages": chat_body(picture(A, "auto"), picture(B))["messages"],
    "max_tokens": 8,
    "temperature": 0,
    "extra_body": {"era": {"level": "strong"}},
}
SAID = [(0.889, "strong", "era", 16)] * 2


def said_by(chunk):
    era = getattr(chunk, "era", None)
    return era and rates({"era": era})


def test_the_sync_client_finds_it(servers):
    completions = client(servers[0]).chat.completions
    whole = completions.create(**OPTIONS)
    assert said_by(whole) == SAID
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    drawn = OPTIONS | {"temperature": 1.0, "n": 2}
    several = completions.create(**drawn, tools=[tool], tool_choice="none")
    assert said_by(several) == SAID
    assert len(several.choices) == 2
    chunks = list(completions.create(**OPTIONS, stream=True))
    assert [said_by(chunk) for chunk in chunks] == [SAID] + [None] * (len(chunks) - 1)
    counted = list(completions.create(**drawn, stream=True, stream_options={"include_usage": True}))
    assert [said_by(chunk) for chunk in counted] == [SAID, *[None] * (len(counted) - 2), SAID]
    with completions.stream(**OPTIONS, stream_options={"include_usage": True}) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert said_by(final) == SAID
    assert text == whole.choices[0].message.content


def test_the_async_client_finds_it(servers):
    """Many at once, each with its own."""

    async def ask(level):
        answer = await completions.create(**OPTIONS | {"extra_body": {"era": {"level": level}}})
        stream = await completions.create(
            **OPTIONS | {"extra_body": {"era": {"level": level}}}, stream=True
        )
        chunks = [chunk async for chunk in stream]
        async with completions.stream(
            **OPTIONS | {"extra_body": {"era": {"level": level}}}
        ) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        return said_by(answer), said_by(chunks[0]), said_by(final)

    async def ask_all():
        nonlocal completions
        async with client(servers[0], AsyncOpenAI) as opened:
            completions = opened.chat.completions
            return await asyncio.gather(*(ask(level) for level in [*LEVELS] * 2))

    completions = None
    found = asyncio.run(ask_all())
    for level, all_three in zip([*LEVELS] * 2, found, strict=True):
        rate, tokens = LEVELS[level]
        assert all_three == ([(rate, level, "era", tokens)] * 2,) * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_leaves_nothing_running(servers, stream):
    body = chat_body(picture(A), max_tokens=900, ignore_eos=True, stream=stream)
    running = "vllm:num_requests_running"
    with httpx.Client(base_url=servers[0].url, timeout=60) as leaving:
        if stream:
            with leaving.stream("POST", CHAT, json=body) as reply:
                assert '"era":' in next(reply.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post(CHAT, json=body, timeout=0.5)
    end = time.monotonic() + 10
    while figures(servers[0], running)[running]:
        assert time.monotonic() < end, "still running"
        time.sleep(0.1)
    assert rates(chat(servers[0], picture(A, "low")))


def test_off_is_served_where_the_default_is_extreme(extreme):
    ask = {"key": KEYS[0]}
    default = chat(extreme, picture(A), **ask)
    assert rates(default) == [(0.944, "extreme", "default", 8)]
    off = chat(extreme, *[picture(A, "high")] * 3, **ask)
    assert rates(off) == [(0.0, "off", "detail", 144)] * 3
    assert image_tokens(extreme, off, KEYS[0]) == 3 * 144
    low, off = picture(A, "low", era={"level": "off"}), picture(A)
    assert [one[3] for one in rates(chat(extreme, low, off, era={"level": "off"}, **ask))] == [
        144,
        144,
    ]


def test_a_detail_out_of_bounds_is_brought_into_them_and_the_answer_says_so(extreme, stock):
    clamped = "era:clamped_images_total"
    before = figures(extreme, clamped, key=KEYS[0])[clamped]
    (image,) = chat(extreme, picture(A, "low"), key=KEYS[0])["era"]["images"]
    assert figures(extreme, clamped, key=KEYS[0])[clamped] == before + 1
    assert image == {
        "pruning_rate": 0.95,
        "level": None,
        "source": "detail",
        "clamped": True,
        "tokens_before": 144,
        "tokens_after": 7,
    }
    reply = post(extreme, CHAT, chat_body(picture(A), era={"level": "strong"}), KEYS[0])
    assert reply.status_code == 400
    assert "'strong', allowed: off (0), extreme (0.944)" in reply.json()["error"]["message"]


def test_at_a_maximum_of_0_rates_above_0_are_400_and_the_engine_is_stock(stock):
    for field in ({"pruning_rate": 0}, {"level": "off"}, None):
        answer = chat(stock, picture(A, "low"), picture(B), era=field)
        source = "default" if field is None else "era"
        assert answer["era"]["policy"] is None
        first, second = answer["era"]["images"]
        assert (first["source"], second["source"]) == ("detail", source)
        assert first["clamped"]
        assert {first["level"], second["level"]} == {"off"}
        assert image_tokens(stock, answer) == 2 * N
    for path, body in ((CHAT, chat_body), (RESPONSES, responses_body), (MESSAGES, messages_body)):
        picture_of = picture(A) if path == CHAT else A
        for field in ({"pruning_rate": 0.01}, {"level": "light"}):
            reply = post(stock, path, body(picture_of, era=field))
            assert reply.status_code == 400
            assert "[0, 0]" in reply.json()["error"]["message"]
        answer = post(stock, path, body(picture_of)).json()
        assert [one["level"] for one in answer["era"]["images"]] == ["off"]
    answer = chat(stock, picture(A, "low", era={"level": "off"}), picture(B))
    sources = [(one["source"], one["clamped"]) for one in answer["era"]["images"]]
    assert sources == [("part", False), ("default", False)]
    reply = post(stock, CHAT, chat_body(picture(A, era={"level": "light"})))
    assert (reply.status_code, "content[0].era.level: got 'light'" in reply.text) == (400, True)


def test_names_of_pictures_are_kept_apart_by_key(extreme):
    """The same name, two clients, two pictures: each is answered about its own."""
    encoded = "era:reduced_images_total"

    def ask(key, image, **more):
        before = settled(extreme, encoded, key=KEYS[0])[encoded]
        options = {"logprobs": True, "top_logprobs": 5, "era": {"level": "off"}}
        answer = chat(extreme, picture(image, **more), key=key, **options)
        count = settled(extreme, encoded, key=KEYS[0])[encoded] - before
        return count, str(answer["choices"][0]["logprobs"])

    first, second = fresh(6, 2100), fresh(7, 2101)
    one = ask(KEYS[0], first, uuid="cat")
    other = ask(KEYS[1], second, uuid="cat")
    assert (one[0], other[0]) == (1, 1)
    assert one[1] != other[1]
    assert ask(KEYS[0], second, uuid="cat") == (0, one[1]), "one's own name is believed"
    alone = picture(first, uuid="cat")
    alone["image_url"] = None
    reply = post(extreme, CHAT, chat_body(alone), KEYS[0])
    assert reply.status_code == 400
    assert "send the picture beside it" in reply.json()["error"]["message"]


def test_a_refused_request_harms_no_other(servers):
    with pytest.raises(BadRequestError, match="era.level"):
        client(servers[0]).chat.completions.create(
            **OPTIONS | {"extra_body": {"era": {"level": 3}}}
        )
    answer = chat(servers[0], picture(A, "low"), text=QUESTION)
    assert rates(answer) == [(0.889, "strong", "detail", 16)]
