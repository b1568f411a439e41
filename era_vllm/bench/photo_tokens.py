"""Visual tokens of a large photo, out of the sample model's tower: a grid of tiles side by side.

The tower takes pictures of one small size, so the photo is enlarged until its tiles make a square
of as many tokens as wanted, and each tile is encoded alone. Features are real and neighbours are
alike; what stands at a tile's edge knows nothing of the next tile, and positions repeat from tile
to tile (a harder case for a sample of queries, which must not favour a column).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from era_vllm.lab.oracle import Oracle
from era_vllm.types import Signal, VisualTokens


@dataclass(frozen=True, slots=True)
class PhotoTokens:
    """One photo's."""

    tokens: VisualTokens
    """One segment of side x side tokens; attention is each tile's own."""
    query: Float[Tensor, "1 n hv dh"]
    """Of the layer that the attention is read from, without CLS."""
    key: Float[Tensor, "1 n hv dh"]
    scale: float


@torch.inference_mode()
def photo_tokens(oracle: Oracle, photo: Image.Image, side: int) -> PhotoTokens:
    """Encode a photo as side x side tokens, a square cut from its middle."""
    tower, config = oracle.model.model.vision_tower, oracle.model.config
    layers = getattr(tower, "vision_model", tower).encoder.layers
    attention, vision = layers[config.vision_feature_layer].self_attn, config.vision_config
    of_tile, pixels = vision.image_size // vision.patch_size, vision.image_size
    tiles = math.ceil(side / of_tile)
    short = min(photo.size)
    left, top = ((length - short) // 2 for length in photo.size)
    middle = photo.convert("RGB").crop((left, top, left + short, top + short))
    square = middle.resize((tiles * pixels, tiles * pixels), Image.Resampling.BICUBIC)
    starts = range(0, tiles * pixels, pixels)
    read: dict[str, list[Tensor]] = {"q_proj": [], "k_proj": []}
    handles = [
        getattr(attention, name).register_forward_hook(
            lambda _, __, out, kept=kept: kept.append(out[:, 1:].clone())
        )
        for name, kept in read.items()
    ]
    try:
        rows = [
            oracle.tokens([square.crop((x, y, x + pixels, y + pixels)) for x in starts])
            for y in starts
        ]
    finally:
        for handle in handles:
            handle.remove()

    def whole(parts: list[Tensor]) -> Tensor:
        """[tiles of a row, m, c] by row -> [1, side * side, c]."""
        grid = torch.stack(parts).unflatten(2, (of_tile, of_tile))
        table = grid.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
        return table[:side, :side].flatten(0, 1)[None]

    signals = {
        signal: whole([row.signals[signal].transpose(1, 2) for row in rows]).transpose(1, 2)
        for signal in (Signal.ENCODER_ATTENTION, Signal.ENCODER_SCORES)
    }
    tokens = VisualTokens(whole([row.embeds for row in rows]), (side, side), signals)
    heads = vision.num_attention_heads
    query, key = (whole(parts).unflatten(-1, (heads, -1)) for parts in read.values())
    return PhotoTokens(tokens, query, key, query.shape[-1] ** -0.5)
