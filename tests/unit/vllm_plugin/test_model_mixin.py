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

    def tapped_layer(self, model, hf_config, layer):
        return TappedLayer(nn.Identity(), 4, self.skipped_keys)


def sources(skipped_keys, **settings):
    """Return the sources of a model with such a tower."""
    from era_vllm.vllm_plugin.model_mixin import PrunedModelMixin

    era = EraConfig(**settings)
    model = SimpleNamespace(
        era=era, policy=make_policy(era), adapter=Tower(skipped_keys), config=None
    )
    return PrunedModelMixin._sources(model)


@pytest.mark.parametrize(("skipped_keys", "queries"), [(0, "all"), (1, "all"), (1, "cls")])
def test_a_tower_is_read(skipped_keys, queries):
    assert len(sources(skipped_keys, attention_queries=queries)) == 2


def test_a_tower_without_cls_token_is_not_read_from_it():
    with pytest.raises(UnsupportedError, match=r"attention_queries: got 'cls', .* allowed: 'all'"):
        sources(0, attention_queries="cls")


def test_a_policy_that_reads_no_attention_does_not_ask_whose():
    assert len(sources(0, attention_queries="cls", policy="uniform")) == 1
