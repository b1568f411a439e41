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


@pytest.mark.parametrize("kind", ["image_url", "video_url"])
def test_era_in_a_part_is_refused(kind: str) -> None:
    within = {"type": kind, kind: {**URL, "era": {"level": "off"}}}
    beside = {"type": kind, kind: URL, "era": {"level": "off"}}
    for part in (within, beside):
        assert "got it in a part of a message" in said(CHAT, part, BOTH)
