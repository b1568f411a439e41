"""A decoder of two layers and a tokenizer, in the place of SmolLM2, which has to be fetched."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from era_vllm.lab.train import smol, words

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def decoder() -> Any:
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def tokenizer() -> "Tokenizer":
    made = words.tokenizer()
    made.add_special_tokens(["<image>"])
    return made


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smol, "decoder", decoder)
    monkeypatch.setattr(smol, "tokenizer", tokenizer)
