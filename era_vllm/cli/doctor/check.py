"""The live check: one answer of a real engine against the oracle, with a control that must fail.

The oracle is given the engine's own reduced embeddings, so that a near-tie between two anchors is
no false alarm; whether plain transformers chooses the same anchors is reported beside it. The
control leaves the bias out: if that makes no difference, the check could not have seen a bug.

Leaves out: starting an engine, and choosing what to ask (``live.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float32
from PIL.Image import Image
from torch import Tensor

from era_vllm.config import EraConfig
from era_vllm.lab.oracle import LanguageOracle, Oracle, Segment
from era_vllm.question import Question

TOLERANCE: Final = 1e-4
"""Largest difference of a log-probability between two float32 implementations that is allowed."""
CONTROL_FACTOR: Final = 3
"""How many tolerances the answer without the bias must be away."""


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """What an engine said about one picture, and what it had put in the picture's place."""

    token_ids: Sequence[int]
    """Prompt and answer, without the answer's last token."""
    log_probs: Float32[Tensor, "m v"]
    """Over the whole vocabulary, for each token of the answer."""
    segments: Sequence[Segment]
    """Of each run of the picture."""
    question: Question = ()
    """For which it was pruned."""


@dataclass(frozen=True, slots=True)
class Check:
    """Largest differences of a log-probability, over all positions and the whole vocabulary."""

    positions: int
    vocabulary: int
    difference: float
    """Engine against oracle."""
    without_bias: float | None
    """Engine against an oracle without the bias; None where every bias is 0."""
    same_anchors: bool | None
    """Plain transformers, with features of its own, chooses the same anchors; None = a family whose
    tower is not asked."""

    @property
    def exact(self) -> bool:
        """Within the tolerance."""
        return self.difference <= TOLERANCE  # False for NaN

    @property
    def control_fails(self) -> bool:
        """The check can see the bias, or there is none to see."""
        return self.without_bias is None or self.without_bias >= CONTROL_FACTOR * TOLERANCE


def compare(
    oracle: LanguageOracle, answer: EngineAnswer, image: Image, config: EraConfig, rate: float
) -> Check:
    """Compare an engine's answer with the oracle.

    Args:
        oracle: The same checkpoint in plain transformers, float32.
        answer: About this one image.
        config: The engine's settings.
        rate: The rate at which the engine pruned the image.
    """
    steps, vocabulary = answer.log_probs.shape

    def difference(bias: bool) -> float:
        expected = oracle.log_probs(
            answer.token_ids,
            answer.segments,
            steps,
            positions=config.positions,
            gamma=config.gamma,
            bias=bias,
        )
        return float((expected - answer.log_probs).abs().max())

    with torch.inference_mode():
        same = None
        if isinstance(oracle, Oracle):
            own = oracle.reduce([image], config, rate, [answer.question]).anchors[0]
            same = own.tolist() == answer.segments[0].anchors.tolist()
        biased = any(bool(segment.log_bias.any()) for segment in answer.segments)
        return Check(
            steps,
            vocabulary,
            difference=difference(True),
            without_bias=difference(False) if biased else None,
            same_anchors=same,
        )
