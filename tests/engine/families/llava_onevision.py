"""LLaVA-OneVision: tiles of 7 x 7 tokens, resized where they are clearly more than nine; videos."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn.functional import pad
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.engine.families import llava_next
from tests.engine.families.case import Unpruned, language, longer, save, save_tokenizer

TILE: Final = 98
PINPOINTS: Final = [
    [TILE * rows, TILE * columns] for rows in range(1, 7) for columns in range(1, 7)
]
IMAGE: Final = 4
VIDEO: Final = 120


class Oracle(llava_next.Oracle):
    """Pictures alone: of several transformers would encode the base views only."""

    kinds = (LlavaOnevisionProcessor, LlavaOnevisionForConditionalGeneration)
    visual_tokens = (IMAGE, VIDEO)
    queries = None  # SigLIP has no class token

    def tower(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last layer's, all tokens."""
        model = self.model.model
        out = model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
        return model.multi_modal_projector(out.hidden_states[-1]), out.attentions[-1].mean(2)

    def packed(
        self, values: torch.Tensor, sizes: torch.Tensor, newline: torch.Tensor
    ) -> torch.Tensor:
        """By a packing that resizes."""
        return self.model.model.pack_image_features([values], sizes, newline)[0][0]

    @torch.inference_mode()
    def item(self, kind: str, data: Any) -> Unpruned:
        """A picture's, or a video's: features and maps by the same pooling."""
        if kind == "image":
            return super().item(kind, data)
        model, processor = self.model.model, self.processor.video_processor
        pixels = processor(data, return_tensors="pt")["pixel_values_videos"][0]
        features, attention = self.tower(pixels)
        pooled = model.apply_pooling(features)
        maps = model.apply_pooling(attention.transpose(1, 2)).flatten(0, 1).T
        frames, n, _ = pooled.shape
        rows = torch.cat([pooled.flatten(0, 1), model.image_newline[None]])
        side = int(n**0.5)
        segments = [((side, side), torch.arange(i * n, i * n + n)) for i in range(frames)]
        return Unpruned(pixels, rows, pad(maps, (0, 1)), segments, torch.tensor([frames * n]))


class LlavaOnevision:
    """The case; of the tests' pictures all but the tall one and the slivers are resized."""

    name = "LlavaOnevisionForConditionalGeneration"
    marks: Mapping[str, str] = {"image": "<image>", "video": "<video>"}
    llm: Mapping[str, Any] = {}

    def save(self, folder: Path) -> None:
        """A SigLIP tower of three layers."""
        torch.manual_seed(0)
        vision = SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=14,
            vision_use_head=False,
        )
        config = LlavaOnevisionConfig(
            vision_config=vision,
            text_config=language(Qwen2Config, 128),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            image_grid_pinpoints=PINPOINTS,
        )
        model = LlavaOnevisionForConditionalGeneration(config)
        save(folder, model, self.name, [IMAGE, VIDEO], longer)
        save_tokenizer(folder, {"<video>": VIDEO})
        images = llava_next.image_processor("LlavaOnevisionImageProcessor", TILE, PINPOINTS)
        videos = {name: images[name] for name in images if not name.startswith("image_grid")}
        del videos["image_processor_type"], videos["do_pad"]
        settings = {
            "image_processor": images,
            "video_processor": {**videos, "video_processor_type": "LlavaOnevisionVideoProcessor"},
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": 49,
            "processor_class": "LlavaOnevisionProcessor",
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        }
        (folder / "processor_config.json").write_text(json.dumps(settings))

    def oracle(self, folder: Path) -> Oracle:
        """Load it."""
        return Oracle(folder)


CASE: Final = LlavaOnevision()
