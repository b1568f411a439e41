"""The scout's batches and what stands before a picture; its layers are tested in the engine."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from era_vllm.errors import ConfigError
from era_vllm.lab import CHECKPOINT
from era_vllm.layout import Layout, SegmentLayout, one_grid
from era_vllm.plan import Plan
from era_vllm.vllm_plugin.families import FAMILIES
from era_vllm.vllm_plugin.fields import Planned

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ([4, 9, 4, 4], 12, [[0, 2], [3], [1]]),
        ([4, 9, 4, 4], 1, [[0], [2], [3], [1]]),
        ([4, 4, 4], 100, [[0, 1, 2]]),
        ([], 5, []),
    ],
)
def test_pictures_of_one_length_are_run_together(lengths, most, expected):
    from era_vllm.vllm_plugin.signals.scout import batches

    assert list(batches(lengths, 2, most)) == expected


def test_words_count_among_the_rows_that_are_run_at_once():
    """Small pictures with long questions take no more than what memory is profiled for."""
    from era_vllm.vllm_plugin.signals.scout import Scout

    class Recorded(Scout):
        def __init__(self, asks):
            self._prefix, self._suffix, self._most = torch.tensor([1, 2]), (8, 9), 40
            self._asks, self.gives, self.runs = asks, frozenset(), []

        def _run(self, layouts, questions, rows):
            self.runs.append((len(rows), [len(one) for one in questions]))
            return {}

    def run(asks, *lengths):
        scout = Recorded(asks)
        items = [Planned(Plan(one_grid(1, 6, ()), (1,), (5,) * n), 0) for n in lengths]
        scout.after(items, [torch.zeros(6, 4)] * len(items))
        return scout.runs

    assert run("largest", 10, 0, 3) == [(2, [12, 0]), (1, [5])]
    assert run("largest", 0, 0, 0) == [(3, [0, 0, 0])]
    assert run(None, 10, 3, 3) == [(3, [0, 0, 0])], "nobody asks"


def two_runs(offsets=None):
    segments = tuple(SegmentLayout((1, 3), torch.arange(first, first + 3)) for first in (0, 3))
    return Layout((), 6, segments, run_lengths=(3, 3), offsets=offsets, spans=(5, 5))


def test_runs_stand_behind_one_another_and_end_with_the_rotary_table():
    from era_vllm.vllm_plugin.signals.scout import _positions

    found = _positions(two_runs(), 2, 8, torch.device("cpu"))
    assert found.tolist() == [0, 1, 2, 3, 4, 7, 8, 8]
    axes = _positions(two_runs(torch.arange(18).view(6, 3)), 1, 99, torch.device("cpu"))
    assert axes.shape == (3, 7) and axes[:, 0].tolist() == [0, 0, 0]
    assert axes[2].tolist() == [0, 3, 6, 9, 17, 20, 23]


@pytest.fixture
def around(monkeypatch):
    """``around(template, mark=...)``: of the sample's tokenizer with another chat template."""
    import vllm.renderers.hf
    import vllm.tokenizers

    from era_vllm.vllm_plugin.scout_text import text_around

    def found(template, mark=None, tokenizer=True, family="LlavaForConditionalGeneration"):
        made = AutoTokenizer.from_pretrained(CHECKPOINT) if tokenizer else None
        monkeypatch.setattr(vllm.tokenizers, "cached_tokenizer_from_config", lambda _: made)
        monkeypatch.setattr(
            vllm.renderers.hf, "resolve_chat_template", lambda *_, model_config: template
        )
        config = SimpleNamespace(image_token_id=mark, architectures=[family])
        ids = text_around(SimpleNamespace(hf_config=config))
        return tuple(made.decode(of).split() for of in ids)

    return found


PARTS = (
    "{{ bos_token }}{% for m in messages %} USER : {% for p in m.content %}"
    "{% if p.type == 'image' %}red <image>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
STRINGS = "{{ bos_token }} USER : {{ messages[0]['content'] + '' }}"
ANSWER = "{% if add_generation_prompt %} red ASSISTANT : {% endif %}"


def test_it_is_what_a_template_writes_before_the_picture_and_behind_the_text(around):
    mark = AutoTokenizer.from_pretrained(CHECKPOINT).convert_tokens_to_ids("<image>")
    assert around(PARTS, mark) == (["<s>", "USER:", "red"], [])
    assert around(PARTS + ANSWER, mark) == (["<s>", "USER:", "red"], ["red", "ASSISTANT:"])


def test_a_template_of_strings_has_the_picture_where_the_text_begins(around):
    assert around(STRINGS) == (["<s>", "USER:"], [])
    assert around(STRINGS + ANSWER) == (["<s>", "USER:"], ["red", "ASSISTANT:"])


@pytest.mark.parametrize("family", ["InternVLForConditionalGeneration", "InternVLChatModel"])
def test_what_a_processor_writes_before_a_picture_stands_there_too(around, family, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], opening="blue"))
    assert around(STRINGS + ANSWER, family=family) == (
        ["<s>", "USER:", "blue"],
        ["red", "ASSISTANT:"],
    )
    assert around(None, family=family) == (["<s>", "blue"], [])


def test_the_sign_that_ends_a_question_is_the_question_s(around):
    """The sample's own template writes it, once, whether the user did or not."""
    template = "{{ messages[0]['content'] | trim('?') }} ?" + ANSWER
    assert around(template) == ([], ["red", "ASSISTANT:"])


def test_a_model_without_a_template_has_its_first_token(around):
    assert around(None) == (["<s>"], [])


@pytest.mark.parametrize(
    "given",
    [
        ("{{ raise_exception('no') }}",),
        ("nothing of it",),
        (STRINGS, None, False),
        ("{{ messages[0].content[1].text }} <image>", 4),
        ("{{ messages[0].content }} {{ messages[0].content }}",),
    ],
    ids=["raises", "leaves the text out", "no tokenizer", "the text first", "the text twice"],
)
def test_what_cannot_be_worked_out_is_asked_for(around, given):
    with pytest.raises(ConfigError, match="scout_prefix: got .*--era-scout-prefix"):
        around(*given)
