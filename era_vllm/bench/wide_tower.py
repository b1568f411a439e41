"""Some layers of a tower that sees a large picture whole, as Qwen3-VL's does; and its attention.

Random weights; 2 x 2 patches are a token. A layer: norm, query, key and value, attention of all
patches to all, projection, norm, MLP. Patch embedding, positions and merger are left out, so the
tower is a little faster than a real one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from era_vllm.bench.clock import seconds
from era_vllm.steps.received_attention import received_attention


@dataclass(frozen=True, slots=True)
class TowerShape:
    """Sizes of a tower."""

    width: int = 1152
    heads: int = 16
    mlp: int = 4304
    layers: int = 27


QWEN3_VL: Final = TowerShape()
"""Source: vision_config of Qwen3-VL-2B to 8B."""


class Layer(nn.Module):
    """One of its layers."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self._heads, width = shape.heads, shape.width
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, shape.mlp), nn.GELU("tanh"), nn.Linear(shape.mlp, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, width]."""
        qkv = self.qkv(self.before(x)).unflatten(-1, (3, self._heads, -1)).permute(1, 2, 0, 3)
        query, key, value = qkv[:, None]
        mixed = scaled_dot_product_attention(query, key, value)[0]
        x = x + self.out(mixed.transpose(0, 1).flatten(1))
        return x + self.mlp(self.between(x))


def tower_cell(
    patches: int, timed: int, dtype: torch.dtype, device: str, shape: TowerShape = QWEN3_VL
) -> Callable[[], Mapping[str, float]]:
    """Return a pass of ``timed`` layers; ``tower`` is their time times all layers / timed."""
    layers = nn.Sequential(*(Layer(shape) for _ in range(timed))).to(device, dtype).eval()
    x = torch.randn(patches, shape.width, device=device).to(dtype)

    @torch.inference_mode()
    def one() -> dict[str, float]:
        taken = seconds(lambda: layers(x))
        return {"timed_layers": taken, "tower": taken * shape.layers / timed}

    return one


def signal_cell(
    patches: int, dtype: torch.dtype, device: str, shape: TowerShape = QWEN3_VL
) -> Callable[[], Mapping[str, float]]:
    """Return a reading of the attention out of one layer."""
    size = (1, patches, shape.heads, shape.width // shape.heads)
    query, key = (torch.randn(size, device=device).to(dtype) for _ in range(2))

    @torch.inference_mode()
    def one() -> dict[str, float]:
        scale = size[-1] ** -0.5
        return {"signal": seconds(lambda: received_attention(query, key, scale))}

    return one
