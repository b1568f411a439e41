"""The oracle without the language model, for who only prunes."""

import torch

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.samples import load_samples


def test_without_the_language_model_the_same_tokens_are_kept():
    image, config = load_samples()[0].image, EraConfig()
    whole, part = (Oracle(str(CHECKPOINT), language=language) for language in (True, False))
    assert len(whole.model.model.language_model.layers) == 4
    assert len(part.model.model.language_model.layers) == 0
    ours, theirs = (oracle.reduce([image], config, 0.889) for oracle in (part, whole))
    for name in ("anchors", "assignment", "log_bias", "embeds"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
