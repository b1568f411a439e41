"""Which parts of a message are refused before anything is fetched, and where ``era`` may stand."""

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
URL = {"url": "data:,"}
VIDEO = {"type": "video_url", "video_url": URL}
BOTH, PICTURES = ("image", "video"), ("image",)


def said(path: str, part: dict[str, object], modalities: tuple[str, ...]) -> str:
    """Return the text of a refusal; empty = none."""
    from era_vllm_server.fields import check

    name = "input" if path == RESPONSES else "messages"
    body = {name: [{"role": "user", "content": [part]}]}
    found = check(path, body, {CHAT, RESPONSES, MESSAGES}, None, modalities)
    return "" if found is None else found.message  # type: ignore[union-attr]


def test_videos_are_taken_in_chats_where_the_model_does() -> None:
    assert said(CHAT, VIDEO, BOTH) == said("/tokenize", VIDEO, BOTH) == ""
    assert "this model takes text and pictures only" in said(CHAT, VIDEO, PICTURES)
    for path in (RESPONSES, MESSAGES):
        assert "videos are taken in chats only" in said(path, VIDEO, BOTH)
        assert "pictures only" in said(path, VIDEO, PICTURES)


@pytest.mark.parametrize("modalities", [BOTH, PICTURES, ("video",), ("video", "image")], ids=str)
def test_audio_is_refused_whatever_a_model_takes(modalities: tuple[str, ...]) -> None:
    assert "leave it out" in said(CHAT, {"type": "input_audio", "input_audio": {}}, modalities)


OFF = {"level": "off"}
IMAGE = {"type": "image_url", "image_url": URL}
BLOCK = {"type": "image", "source": {"type": "base64", "data": "AAAA"}}


def test_era_stands_in_the_part_of_an_item() -> None:
    for path, part in (
        *((CHAT, part) for part in (IMAGE, VIDEO, {"image_url": "data:,"}, {"video_url": URL})),
        (RESPONSES, {"type": "input_image", "image_url": "data:,"}),
        (MESSAGES, BLOCK),
        (MESSAGES, {"type": "tool_result", "content": [{**BLOCK, "era": OFF}]}),
    ):
        own = part if part.get("content") else {**part, "era": OFF}
        assert said(path, own, BOTH) == ""
    for junk in (None, 0, [], "off", {}):  # whose meaning is the route's to check
        assert said(CHAT, {**IMAGE, "era": junk}, BOTH) == ""


@pytest.mark.parametrize(
    ("path", "part", "told"),
    [
        (CHAT, {"type": "text", "text": "?", "era": OFF}, ".era: got it in a part of type 'text'"),
        (CHAT, {"type": "input_audio", "input_audio": {}, "era": OFF}, "type 'input_audio'"),
        (CHAT, {"era": 0}, ".era: got it in a part of type None, allowed: at the top level"),
        (CHAT, {**BLOCK, "era": OFF}, ".era: got it in a part of type 'image'"),
        (CHAT, {"type": "image_url", "image_url": {**URL, "era": OFF}}, ".image_url.era: no such"),
        (CHAT, {"type": "video_url", "video_url": {**URL, "era": OFF}}, ".video_url.era: no such"),
        (CHAT, {"type": "video_url", "video_url": {**URL, "level": "off"}}, ".video_url.level: no"),
        (CHAT, {**VIDEO, "ERA": OFF}, ".ERA: no such field, needed 'era'; put"),
        (CHAT, {**VIDEO, "pruning_rate": 0.5}, ".pruning_rate: no such field"),
        (CHAT, {**VIDEO, "level": "strong"}, ".level: no such field"),
        (MESSAGES, {**IMAGE, "era": OFF}, ".era: got it in a part of type 'image_url'"),
        (MESSAGES, {"type": "tool_result", "content": [BLOCK], "era": OFF}, "'tool_result'"),
        (MESSAGES, {**BLOCK, "source": {"era": OFF}}, ".source.era: no such"),
        (RESPONSES, {"type": "input_text", "text": "?", "era": OFF}, "type 'input_text'"),
        ("/v1/completions", {**IMAGE, "era": OFF}, ".era: got it for /v1/completions, allowed"),
        ("/v1/chat/completions/batch", {**VIDEO, "era": OFF}, "got it for /v1/chat/completions/"),
    ],
    ids=str,
)
def test_era_elsewhere_in_a_message_is_refused_by_its_place(
    path: str, part: dict[str, object], told: str
) -> None:
    found = said(path, part, BOTH)
    at = f"{'input' if path == RESPONSES else 'messages'}[0].content[0]"
    assert found.startswith(f"{at}.") and told in found
    assert len(found) < 300


def test_era_in_a_message_or_a_batch_is_refused_by_its_place() -> None:
    from era_vllm_server.fields import check

    def told(path: str, **fields: object) -> str:
        found = check(path, dict(fields), {CHAT}, None, BOTH)
        return "" if found is None else found.message  # type: ignore[union-attr]

    message = {"role": "user", "content": [{**IMAGE, "era": OFF}]}
    assert told(CHAT, messages=[message]) == ""
    said = told(CHAT, messages=["?", {**message, "era": OFF}])
    assert said.startswith("messages[1].era: got it in a message, allowed: at the top level")
    said = told("/v1/chat/completions/batch", messages=[[], [message]])
    assert said.startswith("messages[1][0].content[0].era: got it for /v1/chat/completions/batch")
    assert told("/tokenize", messages=[message]).startswith("messages[0].content[0].era: got it")
    use = {"type": "tool_use", "input": {"reigns": [{"type": "house", "era": "Tudor"}]}}
    assert told(CHAT, messages=[{"role": "assistant", "content": [use]}]) == ""
    assert told(CHAT, tools=[{"type": "function", "era": 1}], metadata={"era": 1}) == ""


CALLS = (
    {"filters": [{"type": "video", "min": 3}]},
    {"results": [{"video_url": "https://x/y", "title": "t"}], "pattern": "f.{0,2000}r"},
    {"parameters": {"code": "x" * 70_000}},
    {"patternProperties": {"f.{0,2000}r": [{"image_url": "https://x/y", "uuid": "1"}]}},
)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: next(iter(call)))
def test_what_a_tool_was_called_with_is_data(call: dict[str, object]) -> None:
    """The model wrote it, and a client has to send it back with each further turn."""
    from era_vllm_server.fields import check
    from era_vllm_server.middleware.body import excess_of

    def told(path: str, block: dict[str, object]) -> list[str]:
        body: dict[str, object] = {"messages": [{"role": "assistant", "content": [block]}]}
        for owner in (None, "o"):
            found = check(path, body, {MESSAGES}, owner, PICTURES)
            if found is not None:
                return [str(found)]
        return [excess] if (excess := excess_of(path, body)) else []

    use = {"type": "tool_use", "id": "t1", "name": "search", "input": call}
    assert not told(MESSAGES, use) and not told(f"{MESSAGES}/count_tokens", use)
    elsewhere = [told(CHAT, use), told(MESSAGES, {**use, "type": "text"})]
    elsewhere.append(told(MESSAGES, {"type": "text", "text": "", "within": [use]}))
    assert all(elsewhere), "nothing else is passed by"
    assert excess_of(MESSAGES, {"messages": [{"content": [{**use, "input": {"a": ["x"] * 5000}}]}]})
