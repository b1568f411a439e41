"""Which sources of signals a model gets, and what is refused where they are made."""

from types import SimpleNamespace

import pytest
from torch import nn

from era_vllm.config import EraConfig
from era_vllm.contracts import ModelAdapter, TappedLayer
from era_vllm.errors import UnsupportedError
from era_vllm.policies import make_policy
from era_vllm.types import Signal

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


class Tower(ModelAdapter):
    """A tower with some keys in front of its visual tokens'."""

    provides = frozenset({Signal.ENCODER_ATTENTION})

    def __init__(self, skipped_keys):
        self.skipped_keys = skipped_keys

    def language_model(self, model):
        return model.language_model

    def tapped_layer(self, model, hf_config, layer):
        return TappedLayer(nn.Identity(), 4, self.skipped_keys)


def sources(skipped_keys, language_model=None, **settings):
    """Return the sources of a model with such a tower."""
    from era_vllm.vllm_plugin.model_mixin import PrunedModelMixin

    era = EraConfig(**settings)
    model = SimpleNamespace(
        era=era,
        policy=make_policy(era),
        adapter=Tower(skipped_keys),
        config=None,
        language_model=language_model,
        tokens_per_pass=64,
    )
    return PrunedModelMixin._sources(model)


@pytest.mark.parametrize(("skipped_keys", "queries"), [(0, "all"), (1, "all"), (1, "cls")])
def test_a_tower_is_read(skipped_keys, queries):
    assert len(sources(skipped_keys, attention_queries=queries, policy="era")) == 2


def test_a_tower_without_cls_token_is_not_read_from_it():
    with pytest.raises(UnsupportedError, match=r"attention_queries: got 'cls', .* allowed: 'all'"):
        sources(0, attention_queries="cls", policy="era")


def test_a_policy_that_reads_no_attention_does_not_ask_whose():
    assert len(sources(0, attention_queries="cls", policy="uniform")) == 1


class LlamaAttention(nn.Module):
    """Its name is what is asked for."""


def language(attention):
    """Return a language model with such a first layer."""
    layer = nn.Module()
    layer.self_attn, layer.input_layernorm = attention, nn.Identity()
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([layer])
    return model


def test_a_first_layer_is_read_where_a_policy_needs_its_queries():
    (_, queries) = sources(1, language(LlamaAttention()), policy="entropyprune")
    assert queries.gives == {Signal.LANGUAGE_QUERIES}
    assert len(sources(1, policy="dpp")) == 1, "and is not looked for where none does"


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (language(nn.Identity()), "Identity"),
        (nn.Module(), "NoneType"),
    ],
)
def test_a_first_layer_of_another_kind_is_refused(model, got):
    with pytest.raises(UnsupportedError, match=f"first layer of Module: got {got}, allowed: Llama"):
        sources(1, model, policy="entropyprune")


class LlamaMLP(nn.Module):
    """The same."""


class LlamaDecoderLayer(nn.Module):
    """The same."""


class LlamaModel(nn.Module):
    """The same."""


def known(layers):
    """Return a language model of layers that the scout knows."""
    model = nn.Module()
    model.model = LlamaModel()
    model.model.layers = nn.ModuleList()
    for _ in range(layers):
        layer = LlamaDecoderLayer()
        layer.self_attn, layer.mlp, layer.input_layernorm = LlamaAttention(), LlamaMLP(), None
        model.model.layers.append(layer)
    return model


STATES, QUERIES = Signal.SCOUT_STATES, Signal.LANGUAGE_QUERIES


@pytest.mark.parametrize(
    ("scout", "k", "gives"),
    [
        (2, 1, [{QUERIES}, {STATES}]),
        (0, 2, [{QUERIES}]),
        (2, 3, [{STATES, QUERIES}]),
        (3, 2, [{STATES, QUERIES}]),
    ],
)
def test_a_scout_gives_what_is_asked_for(scout, k, gives):
    options = (("entropyprune_k", k),)
    settings = {"policy": "entropyprune", "policy_options": options, "scout": scout}
    _, *found = sources(1, known(3), **settings)
    assert [source.gives for source in found] == gives


def with_experts():
    model = known(3)
    model.model.layers[1].mlp = nn.Identity()
    return model


def with_a_condition():
    model = known(3)
    model.model.layers[0].ada_rms_norm_t_cond = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (language(LlamaAttention()), "got Module, allowed: LlamaModel"),
        (known(1), "got 2 layers, allowed: up to 1"),
        (with_experts(), "layer 2 of LlamaDecoderLayer with LlamaAttention with Identity"),
        (with_a_condition(), "layer 1 of .* with ada_rms_norm_t_cond"),
        (nn.Module(), "got NoneType"),
    ],
    ids=range(5),
)
def test_a_language_model_that_the_scout_does_not_know_is_refused(model, match):
    with pytest.raises(UnsupportedError, match=f"scout of Module: {match}|{match}.*--era-policy"):
        sources(1, model, policy="dpp", scout=2)


def test_a_tower_that_gives_too_little_is_refused_by_name():
    with pytest.raises(
        UnsupportedError, match="'visionzip' needs .*encoder keys.* choose divprune"
    ):
        sources(1, policy="visionzip")
