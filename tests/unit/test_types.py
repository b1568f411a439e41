"""The values that travel, and the checks that the test suite puts on their shapes."""

import pytest
import torch
from jaxtyping import TypeCheckError

from era_vllm.attention.reference import rectified_attention
from era_vllm.policies.dpp import Policy
from era_vllm.steps.similarity import unit
from era_vllm.types import Signal, VisualTokens


def test_tokens_know_their_size_and_signals() -> None:
    tokens = VisualTokens(
        torch.zeros(2, 6, 5), (2, 3), {Signal.ENCODER_SCORES: torch.zeros(2, 4, 6)}
    )
    assert (tokens.segments, tokens.n) == (2, 6)
    assert tokens.signals.keys() == {Signal.ENCODER_SCORES}
    assert not VisualTokens(torch.zeros(2, 6, 5), (2, 3)).signals


def _attention(x: torch.Tensor) -> torch.Tensor:
    tokens = VisualTokens(torch.zeros(2, 6, 5), (2, 3), {Signal.ENCODER_ATTENTION: x})
    return tokens.signal(Signal.ENCODER_ATTENTION)


def test_shapes_are_checked_while_testing() -> None:
    """The import hook of conftest is on; were it off, no annotation would be tested at all."""
    with pytest.raises(TypeCheckError):
        _attention(torch.zeros(2, 4, 7, 1))
    with pytest.raises(TypeCheckError):
        _attention(torch.zeros(2, 4, 6).double())
    with pytest.raises(TypeCheckError):
        unit(torch.zeros(3, 4))
    with pytest.raises(TypeCheckError):
        Policy().select(torch.zeros(3, 4), 2)  # type: ignore[arg-type]
    x = torch.zeros(2, 1, 4)
    with pytest.raises(TypeCheckError):
        rectified_attention(x, x, x, torch.zeros(3), 1.0)
