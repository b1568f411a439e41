"""Which text is asked of an item, and which of its tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from era_vllm.question import MOST, of_prompt, of_text, special_ids

WORDS = ["<s>", "<image>", "<video>", "<pad>", "<", "img", ">", *"abcdefgh"]
START, IMAGE, VIDEO, PAD = range(4)
MARKS = {"image": (IMAGE,), "video": (VIDEO,)}


@dataclass(frozen=True)
class Added:
    """A token that was added to a vocabulary."""

    special: bool


class Tokenizer:
    """A word is a token; that before ``img>`` may have merged with what stands before it."""

    all_special_ids = [START]
    added_tokens_decoder = {
        START: Added(special=True),
        PAD: Added(special=True),
        7: Added(special=False),
    }

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [WORDS.index(word) for word in text.split()]}

    def decode(self, token_ids: Sequence[int], /) -> str:
        return " ".join(WORDS[token] for token in token_ids)


TOKENIZER = Tokenizer()
SPECIAL = special_ids(TOKENIZER)


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def said(questions: Sequence[Sequence[int]]) -> list[str]:
    return [TOKENIZER.decode(one) for one in questions]


def test_special_tokens_are_those_of_templates_and_placeholders() -> None:
    assert {START, PAD} == SPECIAL, "a word that was added is a word"
    assert said([of_text("<s> a <pad> b", TOKENIZER, SPECIAL)]) == ["a b"]


def test_the_first_tokens_count_and_a_long_text_is_not_read_to_its_end() -> None:
    many = " ".join(["a"] * (MOST - 1) + ["b", "c"])
    assert said([of_text(many, TOKENIZER, SPECIAL)])[0].endswith("a b")
    assert len(of_text(many, TOKENIZER, SPECIAL)) == MOST
    blank = " " * 10_000 + "unknown words"
    assert of_text(blank, TOKENIZER, SPECIAL) == ()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<s> a <image> b c", {"image": ["b c"]}),
        ("<image> <image> b", {"image": ["", "b"]}),
        ("<image> a <video> b <image> c", {"image": ["a", "c"], "video": ["b"]}),
        ("<image>", {"image": [""]}),
        ("<image> a <s> b <pad>", {"image": ["a b"]}),
        ("a b", {"image": [""]}),
    ],
)
def test_of_a_rendered_prompt_the_text_up_to_the_next_item(
    prompt: str, expected: dict[str, list[str]]
) -> None:
    counts = {modality: len(some) for modality, some in expected.items()}
    found = of_prompt(ids(prompt), MARKS, counts, TOKENIZER, SPECIAL)
    assert {modality: said(some) for modality, some in found.items()} == expected


def test_a_mark_of_several_tokens() -> None:
    marks = {"image": tuple(ids("< img >"))}
    found = of_prompt(ids("a < img > b < c < img > d"), marks, {"image": 2}, TOKENIZER, SPECIAL)
    assert said(found["image"]) == ["b < c", "d"]


def test_a_mark_that_has_merged_with_its_neighbours_is_found_in_the_text() -> None:
    class Merging(Tokenizer):
        def decode(self, token_ids: Sequence[int], /) -> str:
            return super().decode(token_ids).replace("h", "< img >")

    marks = {"image": tuple(ids("< img >"))}
    found = of_prompt(ids("a h b c h d"), marks, {"image": 2}, Merging(), SPECIAL)
    assert said(found["image"]) == ["b c", "d"]


def test_more_marks_than_items_are_refused() -> None:
    with pytest.raises(LookupError, match="3 places for 2 images"):
        of_prompt(ids("<image> <image> <image> a"), MARKS, {"image": 2}, TOKENIZER, SPECIAL)


@pytest.mark.parametrize(
    ("text", "suffix", "expected"),
    [
        ("abcd", "", "abcd"),
        ("abcd", "cd", "ab"),
        ("abcd", "acd", "abcd"),  # no part of it alone
        ("abd", "cd", "abd"),
        ("cd", "cd", ""),  # nothing but the template's words: nothing is asked
        ("d", "cd", "d"),
    ],
)
def test_what_a_template_writes_behind_is_no_part_of_a_rendered_question(
    text: str, suffix: str, expected: str
) -> None:
    """All of it, in one piece, but for special tokens."""
    own, end, left = (ids(" ".join(some)) for some in (text, suffix, expected))
    prompt, behind = [IMAGE, *own], [PAD, *end, START]
    found = of_prompt(prompt, MARKS, {"image": 1}, TOKENIZER, SPECIAL, behind)
    assert found == {"image": [tuple(left)]}
    assert of_text(" ".join(text), TOKENIZER, SPECIAL) == tuple(own), "a user's own text stays"
