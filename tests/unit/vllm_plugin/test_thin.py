"""Placeholders are thinned run by run, and nothing around them changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from era_vllm.layout import Layout, SegmentLayout, one_grid
from era_vllm.plan import Plan

thin = pytest.importorskip("era_vllm.vllm_plugin.thin", exc_type=ImportError)
processing = pytest.importorskip("vllm.multimodal.processing.processor")
PromptReplacement, Details = processing.PromptReplacement, processing.PromptUpdateDetails
T, START, END, FRAME = 4, 5, 6, 7


def thinned(content: object, plan: Plan) -> tuple[list[int], list[bool]]:
    stock = PromptReplacement(modality="image", target=[T], replacement=lambda _: content)
    found = thin.thinned(stock, [plan]).resolve(0).content
    embed = [True] * len(found.full) if found.is_embed is None else found.is_embed(found.full)
    return list(found.full), [bool(x) for x in embed]


def test_a_run_of_one_token() -> None:
    ids, embed = thinned([T] * 12, Plan(one_grid(3, 4, ()), (5,)))
    assert ids == [T] * 5 and all(embed)


def test_marks_at_both_ends_stay() -> None:
    content = Details.select_token_id([START, *[T] * 12, END], T)
    ids, embed = thinned(content, Plan(one_grid(3, 4, ()), (5,)))
    assert ids == [START, *[T] * 5, END]
    assert embed == [False, *[True] * 5, False]


def test_frames_with_text_between_keep_their_own_number() -> None:
    frames = tuple(SegmentLayout((2, 2), torch.arange(first, first + 4)) for first in (0, 4))
    layout = Layout((), 8, frames, run_lengths=(4, 4))
    content = Details.select_token_id([FRAME, *[T] * 4, FRAME, END, *[T] * 4], T)
    ids, embed = thinned(content, Plan(layout, (1, 3)))
    assert ids == [FRAME, T, FRAME, END, T, T, T]
    assert embed == [False, True, False, False, True, True, True]


@given(
    runs=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)), min_size=1)
)
def test_each_run_keeps_its_first_k_and_all_text(runs: list[tuple[int, int, int]]) -> None:
    is_embed, lengths, kept, expected = [False], [], [], [0]
    for length, count, text in runs:
        lengths.append(length)
        kept.append(min(count, length))
        expected += range(len(is_embed), len(is_embed) + kept[-1])
        is_embed += [True] * length
        expected += range(len(is_embed), len(is_embed) + text)
        is_embed += [False] * text
    assert thin.keep(is_embed, lengths, kept) == expected


@pytest.mark.parametrize(
    ("is_embed", "lengths"),
    [
        ([True] * 3, [4]),
        ([True] * 5, [4]),
        ([True] * 4, [4, 1]),
        ([True, False, True], [2]),
        ([False], [1]),
    ],
)
def test_placeholders_that_are_not_the_layouts_are_a_fault(
    is_embed: list[bool], lengths: list[int]
) -> None:
    with pytest.raises(ValueError, match="placeholders"):
        thin.keep(is_embed, lengths, [1] * len(lengths))
