"""Some layers of a tower that sees a large picture whole, as Qwen3-VL's does; and its attention.

Random weights; 2 x 2 patches are a token. A layer: norm, query, key and value, attention of all
patches to all, projection, norm, MLP. Patch embedding, positions and merger are left out, so the
tower is a little faster than a real one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

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


def tower(shape: TowerShape, layers: int) -> SiglipEncoder:
    """Return some of its layers: SigLIP's, which have the same parts."""
    return SiglipEncoder(
        SiglipVisionConfig(
            hidden_size=shape.width,
            num_attention_heads=shape.heads,
            intermediate_size=shape.mlp,
            num_hidden_layers=layers,
            attn_implementation="sdpa",
        )
    ).eval()


def tower_cell(
    patches: int, timed: int, dtype: torch.dtype, device: str, shape: TowerShape = QWEN3_VL
) -> Callable[[], Mapping[str, float]]:
    """Return a pass of ``timed`` layers; ``tower`` is their time times all layers / timed."""
    layers = tower(shape, timed).to(device, dtype)
    x = torch.randn(1, patches, shape.width, device=device).to(dtype)

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
