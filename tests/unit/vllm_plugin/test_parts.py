"""Which parts of a message are items, and what each says of its own."""

import pytest

from era_vllm.vllm_plugin.parts import (
    PartFields,
    fields_of_items,
    modality_of,
    placed_parts,
    texts_of_items,
    with_lists,
    without_field,
)

OFF = {"level": "off"}


def url(**more: object) -> dict[str, object]:
    return {"url": "data:,", **more}


@pytest.mark.parametrize(
    ("part", "modality"),
    [
        ({"type": "image_url", "image_url": url()}, "image"),
        ({"type": "input_image", "image_url": "data:,"}, "image"),
        ({"type": "image_pil", "image_pil": "pixels"}, "image"),
        ({"image_url": "data:,"}, "image"),
        ({"type": "video_url", "video_url": url()}, "video"),
        ({"video_url": "data:,"}, "video"),
        ({"image_url": "data:,", "video_url": "data:,"}, "image"),
        ({"video_url": "data:,", "input_audio": {}}, None),
        ({"type": "text", "text": "?", "video_url": url()}, None),
        ({"type": "text", "text": "?", "video_url": url(), "uuid": "a"}, "video"),
        ({"type": "image", "source": url()}, None),
        ({"type": ["video_url"], "video_url": url()}, None),
        ({}, None),
    ],
    ids=str,
)
def test_an_item_is_what_vllm_takes_for_one(part: dict[str, object], modality: str | None) -> None:
    assert modality_of(part) == modality


def test_each_item_has_its_place_and_what_it_says_in_the_prompts_order() -> None:
    messages = [
        {"role": "system", "content": "image_url"},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": url(detail="low"), "era": OFF},
                {"type": "text", "text": "?", "detail": "high", "era": OFF},
                {"type": "input_image", "image_url": "data:,", "detail": "high"},
                "text",
                {"type": "video_url", "video_url": url(detail="low"), "detail": "high"},
                {"video_url": "data:,", "era": 3},
            ],
        },
        {"role": "assistant", "content": None},
        "no message",
        {"role": "user", "content": [{"image_url": url()}], "output": [{"image_url": url()}]},
    ]
    assert fields_of_items(placed_parts(messages)) == {
        "image": [
            PartFields("messages[1].content[0]", OFF, "low", "image_url.detail"),
            PartFields("messages[1].content[2]", None, "high"),
            PartFields("messages[4].content[0]"),
        ],
        "video": [
            PartFields("messages[1].content[4]", None, "low", "video_url.detail"),
            PartFields("messages[1].content[5]", 3),
        ],
    }
    found = fields_of_items(placed_parts(messages, "input", ("content", "output")))
    assert [one.at for one in found["image"]][-1] == "input[4].output[0]"
    assert fields_of_items(placed_parts("text")) == {"image": [], "video": []}


def test_a_place_is_the_fields_own_where_there_is_no_part() -> None:
    assert (
        PartFields().place("era") == "era" and PartFields("input[0]").place("era") == "input[0].era"
    )


def test_the_template_sees_no_field_and_the_callers_messages_stay() -> None:
    part = {"type": "image_url", "image_url": url(), "era": OFF, "own": 1}
    tool = {"output": [part], "era": OFF}
    messages = [{"role": "user", "content": iter([part, "text"])}, "text", tool]
    listed = with_lists(messages)
    bare, *rest = without_field(listed)
    assert bare == {
        "role": "user",
        "content": [{"type": "image_url", "image_url": url(), "own": 1}, "text"],
    }
    assert rest == ["text", tool] and "era" in part
    assert fields_of_items(placed_parts(listed))["image"][0].era == OFF
    (*_, stripped) = without_field(listed, ("content", "output"))
    assert stripped == {"output": [{"type": "image_url", "image_url": url(), "own": 1}], "era": OFF}


def picture(name: str = "a") -> dict[str, object]:
    return {"type": "image_url", "image_url": url(name=name)}


def text(said: str, kind: str | None = "text") -> dict[str, object]:
    return {"text": said} if kind is None else {"type": kind, "text": said}


@pytest.mark.parametrize(
    ("messages", "images", "videos"),
    [
        ([{"role": "user", "content": [picture(), text("what?")]}], ["what?"], []),
        ([{"content": [text("a"), picture(), text("b")]}], ["a\nb"], []),
        ([{"content": [picture(), picture(), text("both")]}], ["both", "both"], []),
        (
            [
                {"content": [picture(), {"type": "video_url", "video_url": url()}, text("one")]},
                {"role": "assistant", "content": "an answer"},
                {"content": [text("two", "input_text"), picture()]},
                {"role": "user", "content": "and now?"},
            ],
            ["one", "two"],
            ["one"],
        ),
        ([{"content": [picture()]}, {"content": "what?"}], [""], []),
        ([{"content": ["bare", picture(), text("more", None)]}], ["bare\nmore"], []),
        ([{"content": [picture(), {"type": "refusal", "refusal": "no"}, {"text": 3}]}], [""], []),
        ("no messages", [], []),
    ],
)
def test_what_is_said_beside_an_item_is_its_own_message(
    messages: object, images: list[str], videos: list[str]
) -> None:
    assert texts_of_items(messages) == {"image": images, "video": videos}
