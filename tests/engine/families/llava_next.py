"""LLaVA-NeXT: a base view and tiles of 12 x 12 tokens, newlines."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from PIL.Image import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from tests.engine.families.case import (
    FamilyOracle,
    Unpruned,
    language,
    longer,
    save,
    save_tokenizer,
)

TILE: Final = 168
PINPOINTS: Final = [
    [TILE * rows, TILE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
]
IMAGE: Final = 4


def image_processor(kind: str, tile: int, pinpoints: list[list[int]]) -> dict[str, Any]:
    """Return a tiling image processor's settings."""
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "do_pad": True,
        "image_grid_pinpoints": pinpoints,
        "image_mean": [0.45] * 3,
        "image_std": [0.25] * 3,
        "resample": 3,
        "size": {"height": tile, "width": tile},
    }


class Oracle(FamilyOracle):
    """Places by transformers' packing."""

    dtype = torch.float32
    queries = "all"
    kinds: tuple[type, type] = (LlavaNextProcessor, LlavaNextForConditionalGeneration)

    def __init__(self, folder: Path) -> None:
        processor, model = self.kinds
        self.processor = processor.from_pretrained(folder)
        self.model = model.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def tower(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features [u, m, d] and mean attention [u, heads, m] of tiles."""
        model, hf = self.model.model, self.model.config
        out = model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
        layer, layers = hf.vision_feature_layer, hf.vision_config.num_hidden_layers
        features = model.multi_modal_projector(out.hidden_states[layer][:, 1:])
        queries = slice(0, 1) if self.queries == "cls" else slice(None)
        return features, out.attentions[layers + layer][:, :, queries].mean(2)[:, :, 1:]

    def packed(
        self, values: torch.Tensor, sizes: torch.Tensor, newline: torch.Tensor
    ) -> torch.Tensor:
        """Pack a picture's tiles [u, m, d]."""
        strategy = self.model.config.vision_feature_select_strategy
        return self.model.model.pack_image_features([values], sizes, strategy, newline)[0][0]

    @torch.inference_mode()
    def item(self, kind: str, data: Image) -> Unpruned:
        """A picture's."""
        out = self.processor.image_processor(data, return_tensors="pt")
        pixels, sizes = out["pixel_values"][0], out["image_sizes"]
        features, attention = self.tower(pixels)
        units, m, _ = features.shape
        side = int(m**0.5)
        rows = self.packed(features, sizes, self.model.model.image_newline)
        maps = self.packed(attention.transpose(1, 2), sizes, torch.zeros(attention.shape[1])).T
        places = self._coordinates(units, side, sizes)
        across = get_anyres_image_grid_shape(sizes[0], *self._tiles())[1]
        newlines = (places[:, 0] < 0).nonzero()[:, 0]
        # of the tile that a token's centre is in, which where tokens were resized is none's
        tile = ((places + 0.5 + 1e-9) // side).long()
        number = torch.where(places[:, 0] < 0, -1, 1 + tile[:, 0] * across + tile[:, 1])
        number[:m] = 0
        segments, last = [], []
        for unit in range(units):
            own = (number == unit).nonzero()[:, 0]
            if not len(own):
                continue
            segments.append((tuple(len(x.unique()) for x in places[own].T), own))
            last += [int(own[-1])] if unit else []
        of_tiles = torch.tensor([place for place in newlines if int(place) - 1 in last])
        kept = {"rows": newlines, "tile_rows": of_tiles.long(), "none": newlines[:0]}
        return Unpruned(pixels, rows, maps, segments, kept[self.separators])

    def _tiles(self) -> tuple[list[list[int]], int]:
        hf = self.model.config
        return hf.image_grid_pinpoints, hf.vision_config.image_size

    def _coordinates(self, units: int, side: int, sizes: torch.Tensor) -> torch.Tensor:
        """Return each row's row and column in the grid, [length, 2]; -1 = a newline."""
        across = get_anyres_image_grid_shape(sizes[0], *self._tiles())[1]
        index = torch.arange(side, dtype=torch.float64)
        values = torch.stack(torch.meshgrid(index, index, indexing="ij"), -1).flatten(0, 1)
        values = values.repeat(units, 1, 1)
        for unit in range(1, units):
            values[unit] += side * torch.tensor(divmod(unit - 1, across))
        return self.packed(values, sizes, torch.tensor([-1.0, -1.0]).double()).round(decimals=6)


class LlavaNext:
    """The case."""

    name = "LlavaNextForConditionalGeneration"
    marks: Mapping[str, str] = {"image": "<image>"}
    llm: Mapping[str, Any] = {}

    def save(self, folder: Path) -> None:
        """A CLIP tower of three layers."""
        torch.manual_seed(0)
        vision = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=14,
            projection_dim=64,
            initializer_factor=4.0,  # so that heads differ, see random_llava.py
        )
        config = LlavaNextConfig(
            vision_config=vision,
            text_config=language(LlamaConfig, 128, head_dim=64),
            image_token_index=IMAGE,
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
            image_grid_pinpoints=PINPOINTS,
            image_seq_length=144,
        )
        save(folder, LlavaNextForConditionalGeneration(config), self.name, [IMAGE], longer)
        save_tokenizer(folder)
        settings = {
            "image_processor": {
                **image_processor("LlavaNextImageProcessor", TILE, PINPOINTS),
                "crop_size": {"height": TILE, "width": TILE},
                "do_center_crop": True,
                "size": {"shortest_edge": TILE},
            },
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": "default",
        }
        (folder / "processor_config.json").write_text(json.dumps(settings))

    def oracle(self, folder: Path) -> Oracle:
        """Load it."""
        return Oracle(folder)


CASE: Final = LlavaNext()
