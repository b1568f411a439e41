"""The pruning step alone on random tokens, beside the vision tower that made them.

A policy that reads encoder attention pays for that too: recomputing it from one layer's queries and
keys is timed with the step (inside an engine it happens while the tower runs). The tower is
CLIP-L/14-336 of transformers with random weights, 23 of 24 layers as LLaVA-1.5 runs it, in one
batch of as many images as the tokens come from. Leaves out vLLM.
"""

import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from era_vllm.bench.clock import Cell, seconds
from era_vllm.contracts import PruningPolicy
from era_vllm.lab.dummy import CLIP_L, IMAGE_SIZE, IMAGE_TOKENS
from era_vllm.pipeline import prune
from era_vllm.policies import defaults, make_policy
from era_vllm.steps.received_attention import received_attention
from era_vllm.types import OF_ENCODER, Signal, VisualTokens

HEADS: Final = 16
"""Of CLIP-L."""
_HEAD_SIZE: Final = 64
_MORE: Final = {
    Signal.CLASS_ATTENTION: (HEADS,),
    Signal.ENCODER_KEYS: (HEADS, _HEAD_SIZE),
    Signal.LANGUAGE_QUERIES: (32, 128),
    Signal.RELEVANCE: (1,),
}
_GRAMS: Final = 5  # n x n float32 matrices alive at once (measured: 2.8 for era, 4.1 for dpp)


@dataclass(frozen=True, slots=True)
class Size:
    """So many tokens become so many, in so many segments of equal length."""

    n: int
    """Of a segment."""
    k: int
    """Of a segment."""
    segments: int = 1

    @property
    def images(self) -> int:
        """Images of CLIP-L/14-336 that the tokens come from."""
        return max(1, round(self.segments * self.n / IMAGE_TOKENS))

    @property
    def bytes_needed(self) -> int:
        """Memory that the step may take."""
        return _GRAMS * 4 * self.segments * self.n**2

    def __str__(self) -> str:
        times = f"{self.segments} x " if self.segments > 1 else ""
        return f"{times}{self.n}->{self.k}"


def random_tokens(
    size: Size, width: int, dtype: torch.dtype, device: str, needs: Set[Signal] = frozenset()
) -> VisualTokens:
    """Return segments of noise with attention, scores and hash.

    Args:
        needs: What there is beside them, of ``_MORE``.
    """
    n, segments = size.n, size.segments
    noise = torch.Generator(device).manual_seed(n)
    rows = math.isqrt(n)
    while n % rows:
        rows -= 1
    scores = torch.randn(segments, HEADS, n, device=device, generator=noise)
    more = {
        signal: torch.rand(segments, *shape, n, device=device, generator=noise)
        for signal, shape in _MORE.items()
        if signal in needs
    }
    return VisualTokens(
        torch.randn(segments, n, width, device=device, generator=noise).to(dtype),
        (rows, n // rows),
        {
            Signal.ENCODER_ATTENTION: scores.softmax(-1),
            Signal.ENCODER_SCORES: scores,
            Signal.PIXEL_HASH: torch.arange(segments, device=device),
            **more,
        },
    )


def attention_read(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> Callable[[], object]:
    """Return a reading of the attention out of one layer, of noise.

    Args:    shape: images, tokens, heads, size of a head.
    """
    query, key = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return lambda: received_attention(query, key, shape[-1] ** -0.5)


def reducer_cell(policy: str, size: Size, width: int, dtype: torch.dtype, device: str) -> Cell:
    """Return a pass of the pruning step: ``prune``, and ``signal`` if the policy needs one."""
    chosen: PruningPolicy = make_policy(defaults(policy))
    tokens = random_tokens(size, width, dtype, device, chosen.needs)
    read = attention_read((size.images, IMAGE_TOKENS + 1, HEADS, _HEAD_SIZE), dtype, device)

    def one() -> dict[str, float]:
        taken = {"prune": seconds(lambda: prune(tokens, size.k, chosen))}
        if chosen.needs & OF_ENCODER:
            taken["signal"] = seconds(read)
        return {**taken, "reducer": sum(taken.values())}

    return one


def tower(dtype: torch.dtype, device: str, layers: int) -> nn.Module:
    """Return CLIP-L/14-336 with random weights, one layer short, as LLaVA-1.5 runs it."""
    config = CLIPVisionConfig(**{**CLIP_L, "num_hidden_layers": layers - 1})
    return CLIPVisionModel(config).to(device, dtype).eval()


def tower_cell(model: nn.Module, images: int, dtype: torch.dtype, device: str) -> Cell:
    """Return a pass of the tower over a batch of images."""
    pixels = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, device=device).to(dtype)
    return lambda: {"tower": seconds(lambda: model(pixel_values=pixels))}
