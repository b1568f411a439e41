"""What is refused in a body wherever it is sent, and how ``era`` gets into a response's bytes."""

import asyncio
import json

import pytest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from vllm import envs
from vllm.exceptions import GenerationError

from era_vllm_server.fields import BATCH
from era_vllm_server.middleware import body as bounds
from era_vllm_server.middleware.body import Body
from era_vllm_server.middleware.limits import BodyLimits
from era_vllm_server.responses import in_chat, in_messages, in_responses, with_era

TAKES = "/v1/chat/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def chat(part):
    return {"messages": [{"role": "user", "content": [part]}]}


def send(body, path="/pooling", *, allow=False, key=None, pieces=1, root=""):
    """Give a body to the layer; returns the answer, and what the application was given of it."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    step = -(-len(raw) // pieces) or 1
    parts = [raw[at : at + step] for at in range(0, len(raw), step)] or [b""]
    left = [
        {"type": "http.request", "body": part, "more_body": at + 1 < len(parts)}
        for at, part in enumerate(parts)
    ]
    given, answer = [], []

    async def receive():
        return left.pop(0) if left else {"type": "http.disconnect"}

    async def application(scope, receive, send):
        message = await receive()
        given.append((dict(scope["headers"]), message["body"]))
        assert (await receive())["type"] == "http.disconnect"

    async def sent(message):
        answer.append(message)

    headers = [(b"content-length", str(len(raw)).encode())]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    scope = {"type": "http", "method": "POST", "path": path, "root_path": root, "headers": headers}
    layer = BodyLimits(
        Body(application, frozenset({TAKES}), "era", allow, lambda: ("image",)),
        2**30,
        2**31,
        (b"retry-after", b"2"),
    )
    asyncio.run(layer(scope, receive, sent))
    assert len(given) + (len(answer) > 0) == 1
    if given:
        return None, given[0]
    return (answer[0]["status"], json.loads(answer[1]["body"])["error"]["message"]), None


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_plain_body_is_handed_on_as_it_came(pieces):
    for body in (b"", b"{", b'"era"', b"[]", json.dumps(chat(IMAGE)).encode(), b'{"a": "\\u00e9"}'):
        answer, (_, given) = send(body, pieces=pieces)
        assert (answer, given) == (None, body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"era": {"level": "off"}}',
        b'{"prompt": "x", "era":0}',
        b'{"\\u0065ra": []}',
        '{"era": {}}'.encode("utf-16"),
        '{"era": "é"}'.encode("utf-32"),
    ],
    ids=str,
)
def test_era_is_refused_where_it_has_no_effect_however_it_is_spelt(body):
    (status, said), _ = send(body, "/tokenize", pieces=2)
    assert status == 400
    assert said == f"era: got it for /tokenize, allowed: {TAKES}; leave it out here"
    for path, root in ((TAKES, ""), (f"{TAKES}/", ""), (f"/api{TAKES}", "/api"), (TAKES, "/api")):
        assert send(body, path, root=root) == (None, ({b"content-length": b"%d" % len(body)}, body))
    for path in ("/v1/era", "/v1/era/inspect"):
        assert send(body, path)[0] is None
    assert send(body, "/v1/erase")[0] is not None


def test_era_that_is_null_or_further_in_is_not_ours():
    for body in ({"era": None}, {"metadata": {"era": 1}}, [{"era": 1}], {"a": "era"}):
        assert send(body)[0] is None


@pytest.mark.parametrize(
    "name",
    ["ERA", "Era", "eras", "erra", "_era", "ear", "rea", "era_level", "era-pruning-rate"]
    + ["eraLevel", "ERA_PRUNING_RATE", "x-era", "era.level", "pruning_rate", "pruningRate"]
    + ["prune_rate", "image_pruning_rate"],
)
def test_what_is_nearly_era_is_refused_with_the_right_spelling(name):
    for path in (TAKES, "/anything", "/v1/era/inspect"):
        (status, said), _ = send({**chat(IMAGE), name: {"level": "strong"}}, path)
        assert status == 400
        assert said.startswith(f"{name}: no such field, needed 'era'; put")
        (status, said), _ = send({**chat(IMAGE), "extra_body": {name: 1}}, path)
        assert status == 400 and "top level of the body" in said
        assert send({**chat(IMAGE), name: None}, path)[0] is None
        assert send({**chat(IMAGE), "metadata": {name: 1}, "extra_body": name}, path)[0] is None


def test_era_in_an_extra_body_or_a_level_by_itself_is_refused():
    for body in ({"extra_body": {"era": {"level": "off"}}}, {"extra_body": {"a": 1, "ERA": 0}}):
        (status, said), _ = send(body, TAKES)
        assert status == 400
        assert 'put {"era": {"level": "strong"}} at the top level of the body' in said
    assert send({"level": "strong"}, TAKES)[0] is not None


def test_no_field_of_vllms_and_no_other_extra_is_taken_for_era():
    """Every name that a body of any route may have, and what clients add that vLLM ignores."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scale-out", "x"])
    schemas = build_app(arguments, ("generate", "embed")).openapi()["components"]["schemas"]
    names = {name for schema in schemas.values() for name in schema.get("properties", ())}
    assert names >= {"messages", "temperature", "input", "max_tokens", "stop"} and len(names) > 300
    extras = {"erase", "eraser", "opera", "camera", "area", "extra", "level", "extra_body", "are"}
    for value in (1, "debug", {"a": 1}, ["strong"]):
        body = dict.fromkeys(names | extras, value) | {"messages": [], "features": None}
        assert send(body, TAKES)[0] is None


PARTS = [
    {**IMAGE, "uuid": "cat"},
    {"image_url": "data:,", "uuid": "cat"},
    {"type": "text", "text": "?", "image_url": "data:,", "uuid": "3"},
    {"type": "input_image", "image_url": "data:,", "uuid": ""},
    {"type": ["odd"], "image_url": "data:,", "uuid": "cat"},
]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": None, "uuid": "cat"},
        {"type": "image_url", "image_url": "data:,", "uuid": {"a": 1}},
    ],
    ids=str,
)
def test_a_name_has_to_be_a_string_beside_its_picture(part):
    (status, said), _ = send(chat(part), TAKES, allow=True, key="a")
    assert (status, said) == (
        400,
        "uuid: got no string, or a name alone; send the picture beside it",
    )


def test_pictures_of_offline_callers_are_refused():
    for part in ({"type": "image_pil", "image_pil": "abc"}, {"image_pil": None}):
        (status, said), _ = send(chat(part), TAKES)
        assert (status, said.partition(":")[0]) == (400, "image_pil")


def test_era_of_a_part_passes_and_beside_a_url_it_does_not():
    assert (
        send({**chat({**IMAGE, "era": {"level": "off"}}), "era": {"level": "off"}}, TAKES)[0]
        is None
    )
    (status, said), _ = send(chat({"image_url": {"url": "data:,", "era": 0}}), TAKES)
    assert (status, said.partition(":")[0]) == (400, "messages[0].content[0].image_url.era")
    assert send({**chat(IMAGE), "metadata": {"era": 1}}, TAKES)[0] is None


def test_a_batch_has_the_limit_of_prompts():
    most = envs.VLLM_MAX_COMPLETION_PROMPTS
    assert send({"messages": [[]] * most}, BATCH)[0] is None
    (status, said), _ = send({"messages": [[]] * (most + 1)}, BATCH)
    assert (status, said) == (
        400,
        f"messages: got {most + 1} chats, allowed: {most} in one request",
    )


def test_half_a_character_is_refused():
    for text in (r'"\ud800"', r'"\uDFFF\u0041"'):
        (status, said), _ = send(b'{"stop": ' + text.encode() + b"}", TAKES)
        assert (status, "half a character" in said) == (400, True)
    half, whole = '{"stop": "\ud800"}', '{"stop": "\U0001f600 \ud55c"}'
    for how in ("utf-8", "utf-16", "utf-32"):
        assert send(half.encode(how, "surrogatepass"), TAKES)[0] is not None, how
        assert send(whole.encode(how), TAKES)[0] is None, how
    for text in (r'"\ud83d\ude00"', r'"\\ud800"'):
        assert send(b'{"stop": ' + text.encode() + b"}", TAKES)[0] is None


def test_a_form_is_not_looked_into():
    body = b"--x\r\n\r\n" + b"[" * 2**18 + b"\r\n--x--"
    assert send(body, "/v1/audio/transcriptions")[0] is None


def many(name, element, count):
    return f'{{"{name}":['.encode() + b",".join([element] * count) + b"]}"


TOO_MUCH = {
    "131072 of [{": many("a", b"[]", 2**17 + 1),
    "524288 of ,": many("tokens", b"1", 2**19 + 2),
    '1048576 of "': b'{"a":"' + rb"\"" * 2**20 + b'"}',
    "1048576 of \\": b'{"a":"' + rb"\u00e9" * (2**20 + 1) + b'"}',
    "100 levels": b'{"a":' + b"[" * 101 + b"]" * 101 + b"}",
    "100 levels ": b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "4194304 characters": b'{"a":"' + b"x" * 2**22 + b'"}',
    "4194304 characters ": b'{"prompt":["' + b'x","' * 9 + b"x" * 2**22 + b'"]}',
    "8192 objects": b'{"a":[' + b",".join([many("b", b"{}", 4000)] * 3) + b"]}",
    "4096 members in logit_bias": b'{"logit_bias":{'
    + b",".join(b'"%d":1' % at for at in range(4097))
    + b"}}",
    "4096 items in stop": many("stop", b'"a"', 4097),
    "4096 items in prompt": many("prompt", b"1.5", 4097),
    "1024 items in input": many("input", b'{"role":"user","content":"a"}', 1025),
    "16384 items": b'{"a":[' + b",".join([many("b", b'"a"', 4000)] * 5) + b"]}",
    "1000 repetitions in a pattern": {"a": {"type": "string", "pattern": "^(a|b){1,5000}$"}},
    "1000 repetitions in a pattern ": {"a": {"pattern": "((a{90}){900}){900}"}},
    "1000 repetitions in a pattern  ": {"patternProperties": {"^x{2000}$": {}}},
    "65536 characters of choices": {"structured_outputs": {"choice": ["a" * 40_000] * 2}},
    "65536 characters of choices ": {"response_format": {"schema": {"const": "a" * 70_000}}},
    "65536 characters of choices  ": {"structured_outputs": {"regex": "a" * 70_000}},
    "65536 characters of choices   ": {
        "response_format": {
            "json_schema": {"schema": {"properties": {f"{at:_>1000}": {} for at in range(70)}}}
        }
    },
    "65536 characters of choices    ": {
        "structured_outputs": {"json": {"enum": [{"a": "x" * 70_000}]}}
    },
    "65536 characters of choices     ": {
        "tools": [{"function": {"parameters": {"patternProperties": {"x" * 70_000: {}}}}}]
    },
    "65536 characters of choices, bad words": {"bad_words": ["a " * 35_000]},
    "8388608 digits": many("input", b"9" * 600, 14_000),
    "4096 items in content": b'{"messages":[' + many("content", b"0", 5000) + b"]}",
    "128 items in bad_words": {"bad_words": ["a"] * 129},
    "1024 items in choice": b'{"structured_outputs":' + many("choice", b'"a"', 1025) + b"}",
}


def test_a_text_that_comes_back_as_tokens_is_shorter():
    body = {"prompt": "b " * 2**18}
    assert send(body, TAKES)[0] is None
    (status, said), _ = send({**body, "add_special_tokens": True}, "/tokenize")
    assert (status, "524288 characters" in said) == (400, True)


@pytest.mark.parametrize("bound", TOO_MUCH)
def test_bodies_that_would_hold_up_the_server_are_refused(bound):
    (status, said), _ = send(TOO_MUCH[bound], "/invocations")
    start = f"the body holds more than {bound.strip()}"
    assert (status, said[: len(start)]) == (400, start)
    assert said.endswith("; send less at once")


def test_what_a_schema_says_to_people_is_not_compiled():
    tool = {"function": {"parameters": {"properties": {"a": {"description": "x " * 40_000}}}}}
    assert send({"tools": [tool]}, TAKES)[0] is None


def test_a_number_has_an_end():
    """Python's time for one is the square of its digits."""
    send({})
    with pytest.raises(ValueError, match="640 digits"):
        json.loads("9" * 641)
    assert send(b'{"seed":' + b"9" * 641 + b"}", TAKES)[0] is None  # the route's to refuse


def test_the_time_of_a_check_is_that_of_its_bytes():
    """Runs just too short for what looks for long ones; counted in steps of the interpreter."""
    body = b'{"a":"' + (b"A" * 4090 + rb"\n") * 5000 + b'"}'
    (status, said), _ = send(body, TAKES)  # 20 MB; took minutes where it was searched
    assert (status, "characters" in said) == (400, True)


def test_no_more_of_patterns_is_searched_than_may_be_there(monkeypatch):
    searched = []
    monkeypatch.setattr(bounds, "_repeats_much", lambda text: searched.append(len(text)))
    long = {"structured_outputs": [{"regex": "a" * 60_000}] * 99}
    names = {"patternProperties": {f"{at}{'x' * 2**19}": {} for at in range(20)}}
    for body in ({"regex": "a" * 2**22}, long, names):
        assert send(body, TAKES)[0][0] == 400
    assert 0 < sum(searched) <= bounds.MAX_COMPILED


@pytest.mark.parametrize(
    "body",
    [
        many("allowed_token_ids", b"1", 2**19),
        many("enum", b'"a"', 5000),
        {"pattern": "^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$", "regex": "(a{9}){,9}{x}"},
        many("input", b'"a"', 1024),
        {"a": "x" * (2**22 - 1)},
        chat({"type": "image_url", "image_url": {"url": "data:," + ("A" * 76 + "\r\n") * 2**17}}),
        chat({"type": "image_url", "image_url": {"url": "data:," + "A" * 2**23}}),
        chat({"type": "image", "source": {"type": "base64", "data": "A" * 2**23}}),
    ],
    ids=[
        "token ids",
        "an enumeration",
        "patterns",
        "items",
        "text",
        "a picture in lines",
        "a picture",
        "messages' picture",
    ],
)
def test_what_is_large_and_quick_passes(body):
    assert send(body, TAKES)[0] is None


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_names_of_pictures_are_refused_or_kept_apart_by_key(part):
    bodies = [
        chat(part),
        {"input": [{"role": "user", "content": [part]}]},
        {"token_ids": [1], "content_parts": [part]},
        {"messages": [[{"role": "user", "content": [IMAGE, part]}]], "odd": [[[part]]]},
    ]
    for path in (TAKES, "/anything"):
        for body in bodies:
            (status, said), _ = send(body, path)
            assert status == 400
            assert "--era-allow-image-uuid" in said
    seen = set()
    for key in ("a", "b", None):
        for _ in range(2):
            answer, (headers, raw) = send(bodies[0], TAKES, allow=True, key=key)
            assert answer is None
            assert int(headers[b"content-length"]) == len(raw)
            (given,) = json.loads(raw)["messages"][0]["content"]
            owner, _, name = given.pop("uuid").partition("-")
            assert name == str(part["uuid"])
            assert given == {k: v for k, v in part.items() if k != "uuid"}
            seen.add(owner)
    assert len(seen) == 3
    assert all(len(owner) == 16 for owner in seen)


def test_what_only_looks_like_a_name_passes():
    properties = {"uuid": {"type": "string"}, "image_url": {"type": "string"}}
    tool = {"type": "function", "function": {"parameters": {"properties": properties}}}
    for body in (
        {"tools": [tool]},
        {"uuid": "x"},
        chat({"type": "text", "text": "?", "uuid": "x"}),
        chat({**IMAGE, "uuid": None}),
    ):
        assert send(body, TAKES)[0] is None


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "data:,"}, "uuid": "cat"},
        {"audio_url": {"url": "data:,"}},
        {"type": "input_audio", "input_audio": {"data": ""}},
        {"type": "video", "source": {"type": "url", "url": "x"}},
    ],
    ids=str,
)
def test_video_and_audio_are_one_clear_refusal(part):
    for body in (
        chat(part),
        {"input": [{"role": "user", "content": [part]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [part]}]}]},
        {"messages": [[{"role": "user", "content": [part]}]]},
    ):
        (status, said), _ = send(body, TAKES, allow=True, key="a")
        assert (status, "text and pictures only" in said) == (400, True)
    others = {"documents": [part], "metadata": {"a": [part]}}
    assert send({**chat(IMAGE), **({} if "uuid" in part else others)}, TAKES)[0] is None
    assert send({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, TAKES)[0] is None


def test_rendered_features_are_not_taken():
    body = {"token_ids": [1], "features": {"mm_hashes": {"image": ["abc"]}}}
    for allow in (False, True):
        (status, said), _ = send(body, "/inference/v1/generate", allow=allow)
        assert status == 400
        assert "another client's picture" in said
    assert send({"features": "mm_hashes"})[0] is None


ERA = {"policy": "era", "images": [{"level": "größer"}]}
MEMBER = b',"era":' + json.dumps(ERA, separators=(",", ":")).encode()


def test_the_object_goes_into_a_json_body_and_nothing_else_changes():
    stock = {"id": "1", "n": [1e-7, 1.0], "text": 'é "}', "usage": {"a": None}}
    before, after = JSONResponse(stock), with_era(JSONResponse(stock), ERA, in_chat)
    assert after.body.replace(MEMBER, b"") == before.body
    assert json.loads(after.body) == {**stock, "era": ERA}
    assert after.headers["content-length"] == str(len(after.body))
    refused = JSONResponse({"error": {}}, 400)
    assert with_era(refused, ERA, in_chat).body == JSONResponse({"error": {}}).body
    assert with_era(Response(), ERA, in_chat).body == b""  # to a client that has gone, vLLM 0.33


CHUNKS = [
    ": keep-alive\n\n",
    'data: {"id":"1","choices":[{"delta":{"content":"\\"choices\\":[]}"}}],"x":1e-7}\n\n',
    'data: {"id":"1","choices":[{"delta":{"content":"é}\\n\\n"}}]}\n\n',
    'data: {"id":"1","choices":[],"usage":{"prompt_tokens":3}}\n\n',
    "data: [DONE]\n\n",
]
RESPONSE = '"response":{"id":"1","output":[{"text":"}\\"response\\":{"}],"t":0.10}'
EVENTS = [
    f'event: response.created\ndata: {{{RESPONSE},"sequence_number":0,"type":"x"}}\n\n',
    'event: response.output_text.delta\ndata: {"delta":"\\"response\\":{}"}\n\n',
    f'event: response.in_progress\ndata: {{{RESPONSE},"sequence_number":1}}\n\n',
    f'event: response.completed\ndata: {{"sequence_number":9,{RESPONSE}}}\n\n',
]
MESSAGE = [
    'event: message_start\ndata: {"type":"message_start","message":{"id":"1","usage":{"a":1}}}\n\n',
    'event: message_delta\ndata: {"delta":{"stop_reason":"end"},"usage":{"b":2}}\n\n',
]


@pytest.mark.parametrize(
    ("stock", "place", "holders"),
    [
        (CHUNKS, in_chat, {1: (), 3: ()}),
        (['data: {"error":{"message":"\\"choices\\":"}}\n\n'], in_chat, {}),
        (EVENTS, in_responses, {0: ("response",), 3: ("response",)}),
        (MESSAGE, in_messages, {0: ("message",)}),
    ],
    ids=["chat", "an error", "responses", "messages"],
)
def test_the_object_goes_into_some_events_and_nothing_else_changes(stock, place, holders):
    async def events():
        for event in stock:
            yield event

    async def collect():
        response = with_era(StreamingResponse(events()), ERA, place)
        return [event async for event in response.body_iterator]

    found = asyncio.run(collect())
    assert [event.replace(MEMBER.decode(), "") for event in found] == stock
    for at, event in enumerate(found):
        assert (MEMBER.decode() in event) == (at in holders)
        if at in holders:
            data = json.loads(event.partition("data: ")[2])
            for name in holders[at]:
                data = data[name]
            assert data["era"] == ERA


@pytest.mark.parametrize(("error", "code"), [(GenerationError(), 500), (ValueError("x"), 400)])
def test_an_error_within_a_stream_is_its_last_event(error, code):
    async def failing():
        yield f"event: response.created\ndata: {{{RESPONSE}}}\n\n"
        raise error

    async def read():
        response = with_era(StreamingResponse(failing()), ERA, in_responses)
        return [event async for event in response.body_iterator]

    first, last = asyncio.run(read())
    assert MEMBER.decode() in first
    assert last.startswith("event: error\ndata: {") and f'"code":{code}' in last
