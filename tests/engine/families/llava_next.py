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

    def __init__(self, folder: Path) -> None:
        self.processor = LlavaNextProcessor.from_pretrained(folder)
        self.model = LlavaNextForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def item(self, kind: str, data: Image) -> Unpruned:
        """A picture's."""
        model, hf = self.model.model, self.model.config
        out = self.processor.image_processor(data, return_tensors="pt")
        pixels, sizes = out["pixel_values"][0], out["image_sizes"]
        tower = model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
        layer = hf.vision_feature_layer
        features = model.multi_modal_projector(tower.hidden_states[layer][:, 1:])
        layers = hf.vision_config.num_hidden_layers
        queries = slice(0, 1) if self.queries == "cls" else slice(None)
        attention = tower.attentions[layers + layer][:, :, queries].mean(2)[:, :, 1:]
        units, m, _ = features.shape
        side = int(m**0.5)

        def packed(values: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
            strategy = hf.vision_feature_select_strategy
            return model.pack_image_features([values], sizes, strategy, newline)[0][0]

        rows = packed(features, model.image_newline)
        maps = packed(attention.transpose(1, 2), torch.zeros(attention.shape[1])).T
        numbers = torch.arange(units * m, dtype=torch.float64).view(units, m, 1)
        number = packed(numbers, torch.tensor([-1.0]).double())[:, 0].long()
        segments, last = [], []
        for unit in range(units):
            places = ((number // m == unit) & (number >= 0)).nonzero()[:, 0]
            if not len(places):
                continue
            inside = number[places] % m
            grid = len((inside // side).unique()), len((inside % side).unique())
            segments.append((grid, places))
            last += [int(places[-1])] if unit else []
        newlines = (number < 0).nonzero()[:, 0]
        of_tiles = torch.tensor([place for place in newlines if int(place) - 1 in last])
        kept = {"rows": newlines, "tile_rows": of_tiles.long(), "none": newlines[:0]}
        return Unpruned(pixels, rows, maps, segments, kept[self.separators])


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
