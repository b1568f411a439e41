"""The source of relevance: who is asked, where it is put, and the first layer's own modules."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from era_vllm.errors import UnsupportedError
from era_vllm.layout import Layout, SegmentLayout, one_grid
from era_vllm.plan import Plan
from era_vllm.types import Signal
from era_vllm.vllm_plugin.fields import Planned, names, pack_items, unpack_items

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

WITH_NEWLINES = Layout(
    (), 6, (SegmentLayout((2, 2), torch.tensor([0, 1, 3, 4])),), torch.tensor([2, 5])
)


class Form:
    """Each word attends to a token as its id times the token's first value."""

    def __init__(self):
        self.asked = []

    def attention(self, questions, tokens):
        self.asked.append([len(one) for one in questions])
        pairs = zip(questions, tokens, strict=True)
        return [one.float()[:, None] * rows[None, :, 0].float() for one, rows in pairs]


def items(*asked):
    return [Planned(Plan(layout, (1,), question), 0) for layout, question in asked]


def relevance_of(form, some, rows, reduction="largest", width=None):
    from era_vllm.vllm_plugin.signals.question import QuestionRelevance

    source = QuestionRelevance(form, reduction, width)
    source.before(some)
    return source.after(some, rows)[Signal.RELEVANCE]


def test_only_who_is_asked_something_is_and_newlines_are_no_tokens():
    form = Form()
    some = items((one_grid(1, 3, ()), ()), (WITH_NEWLINES, (2, 3)), (one_grid(1, 3, ()), (5,)))
    rows = [torch.arange(1.0, 1 + n)[:, None].expand(n, 2) for n in (3, 6, 3)]
    found = relevance_of(form, some, rows)
    assert [one.tolist() for one in found] == [
        [[0, 0, 0]],
        [[3, 6, 0, 12, 15, 0]],
        [[5, 10, 15]],
    ]
    assert form.asked == [[2, 1]], "together"
    mean = relevance_of(Form(), some, rows, "mean")
    assert mean[1].tolist() == [[2.5, 5, 0, 10, 12.5, 0]]
    assert {one.dtype for one in found} == {torch.float32}


def test_where_nothing_is_asked_no_work_is_done():
    form = Form()
    (found,) = relevance_of(form, items((one_grid(1, 3, ()), ())), [torch.ones(3, 2)])
    assert not found.any() and not form.asked


def test_riders_are_no_part_of_a_token():
    class Widths(Form):
        def attention(self, questions, tokens):
            assert {rows.shape[1] for rows in tokens} == {2}
            return super().attention(questions, tokens)

    some = items((one_grid(1, 3, ()), (1,)))
    relevance_of(Widths(), some, [torch.ones(3, 7)], width=2)


class LlamaAttention(nn.Module):
    """Four query heads and two of keys, of 3; their projection is ours to read."""

    q_size, kv_size, head_dim, scaling = 12, 6, 3, 0.5

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 24)

    def qkv_proj(self, x):
        return self.linear(x), None


def language():
    layer, body, model = nn.Module(), nn.Module(), nn.Module()
    layer.self_attn, layer.input_layernorm = LlamaAttention(), nn.LayerNorm(5)
    body.layers, body.embed_tokens = nn.ModuleList([layer]), nn.Embedding(11, 5)
    model.model = body
    return model


def test_the_first_layer_s_attention_is_that_of_its_modules(monkeypatch):
    from era_vllm.vllm_plugin.signals import ranks
    from era_vllm.vllm_plugin.signals.question import FirstLayerForm

    monkeypatch.setattr(ranks, "get_tensor_model_parallel_world_size", lambda: 1)
    torch.manual_seed(0)
    model, ids = language(), [torch.tensor([3, 4]), torch.tensor([9])]
    tokens = [torch.randn(4, 5), torch.randn(7, 5)]
    with torch.inference_mode():
        found = FirstLayerForm(model).attention(ids, tokens)
        layer, own = model.model.layers[0], model.model.layers[0].self_attn
        for words, rows, attention in zip(ids, tokens, found, strict=True):
            query = own.linear(layer.input_layernorm(model.model.embed_tokens(words)))[:, :12]
            key = own.linear(layer.input_layernorm(rows))[:, 12:18]
            expected = torch.stack(
                [
                    (
                        query[:, 3 * h : 3 * h + 3] @ key[:, 3 * (h // 2) : 3 * (h // 2) + 3].T / 2
                    ).softmax(-1)
                    for h in range(4)
                ]
            ).mean(0)
            torch.testing.assert_close(attention, expected, atol=1e-6, rtol=0)


def test_ranks_heads_are_averaged(monkeypatch):
    from era_vllm.vllm_plugin.signals import ranks

    of_ranks = [torch.rand(2, 5), torch.rand(2, 5)]
    monkeypatch.setattr(ranks, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(
        ranks, "tensor_model_parallel_all_gather", lambda x, dim: torch.cat(of_ranks, dim)
    )
    found = ranks.mean_over_ranks(of_ranks[0])
    torch.testing.assert_close(found, (of_ranks[0] + of_ranks[1]) / 2)
    assert ranks.all_heads(of_ranks[0]).shape == (4, 5), "side by side"


def test_another_first_layer_is_refused():
    from era_vllm.vllm_plugin.signals.question import FirstLayerForm

    with pytest.raises(UnsupportedError, match="got Identity, allowed: Llama.*such as dpp"):
        layer = nn.Module()
        layer.self_attn = nn.Identity()
        FirstLayerForm(SimpleNamespace(model=SimpleNamespace(layers=[layer])))
    with pytest.raises(UnsupportedError, match="got NoneType"):
        FirstLayerForm(SimpleNamespace(model=SimpleNamespace(layers=[])))


def test_questions_travel_beside_the_pixels_where_they_count():
    grid = one_grid(1, 3, ())
    plans = [Plan(grid, (1,), question) for question in ((), (3, 4), (5,))]
    assert "era_question" not in pack_items(plans, [1, 2, 3], "image")
    assert "era_question" not in names(question_aware=False)
    fields = pack_items(plans, [1, 2, 3], "video", question_aware=True)
    assert set(fields) == {f"video_{name}" for name in names(question_aware=True)}
    found = unpack_items({**fields}, lambda *_: grid, "video")
    assert [one.plan.question for one in found] == [(), (3, 4), (5,)]
    left = dict(fields)
    del left["video_era_question"]
    assert [one.plan.question for one in unpack_items(left, lambda *_: grid, "video")] == [()] * 3
