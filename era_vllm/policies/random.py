"""Keep random tokens, the same ones for the same picture. A baseline.

Chance comes from a hash of the pixel values that travels with the segment: not from a generator
(caches would go wrong) and not from features (their last bits differ between machines).
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.errors import ConfigError
from era_vllm.steps.bias import log_cluster_size
from era_vllm.steps.merge import nearest
from era_vllm.types import Clusters, Signal, VisualTokens

# splitmix64 (Steele et al. 2014) in int64 arithmetic, which wraps around
_GAMMA: Final = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX: Final = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


@dataclass(frozen=True, slots=True)
class Policy:
    """A random subset drawn without replacement, nested in a."""

    seed: int = 0
    """Another seed, another draw; a signed 64-bit integer."""

    def __post_init__(self) -> None:
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ConfigError(
                f"policy 'random' seed: got {self.seed}, allowed: 64 bits, -2**63 to 2**63 - 1"
            )

    @property
    def needs(self) -> frozenset[Signal]:
        """The hash that the draw starts from."""
        return frozenset({Signal.PIXEL_HASH})

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """Return the a tokens whose hashes are smallest, ascending."""
        step = torch.arange(1, tokens.n + 1, device=tokens.pixel_hash.device) * _GAMMA
        x = (tokens.pixel_hash[:, None] ^ self.seed) + step
        for shift, factor in _MIX:
            x = (x ^ _logical_shift(x, shift)) * factor
        x = x ^ _logical_shift(x, 31)
        return x.argsort(dim=-1, stable=True)[:, :num_anchors].sort(-1).values

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Each token joins its nearest anchor by cosine."""
        return nearest(tokens, anchors)

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return ln of the cluster size."""
        return log_cluster_size(clusters)


def _logical_shift(x: Int[Tensor, "s n"], bits: int) -> Int[Tensor, "s n"]:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
