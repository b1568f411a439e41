"""InternVL, transformers' layout: tiles and frames of 6 x 6 tokens, a thumbnail, texts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)

from tests.engine.families.case import FamilyOracle, Unpruned, language, save, save_tokenizer

TILE: Final = 168
TOKENS: Final = {"<img>": 140, "</img>": 141, "<IMG_CONTEXT>": 142, "<video>": 143}
VOCABULARY: Final = 160


class Oracle(FamilyOracle):
    """Tokens, and their attention, by transformers' own pixel shuffle."""

    dtype = torch.float32
    queries = "all"
    visual_tokens = (142, 143)

    def __init__(self, folder: Path) -> None:
        self.model = InternVLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.folder = folder

    @torch.inference_mode()
    def item(self, kind: str, data: Any) -> Unpruned:
        """A picture's or video's."""
        model, pixels = self.model.model, self.pixels(kind, data)
        tower = model.vision_tower(pixels, output_attentions=True)
        queries = slice(0, 1) if self.queries == "cls" else slice(None)
        attention = tower.attentions[-1][:, :, queries].mean(2)[:, :, 1:]
        rows = model.multi_modal_projector(self.shuffled(tower.last_hidden_state[:, 1:]))
        units, n, _ = rows.shape
        four = self.shuffled(attention.transpose(1, 2)).unflatten(-1, (4, -1))
        maps = four.mean(2).flatten(0, 1).T
        side = int(n**0.5)
        segments = [((side, side), torch.arange(n) + unit * n) for unit in range(units)]
        runs = (n,) * units if kind == "video" else ()
        none = torch.zeros(0, dtype=torch.int64)
        return Unpruned(pixels, rows.flatten(0, 1), maps, segments, none, runs)

    def pixels(self, kind: str, data: Any) -> torch.Tensor:
        """Return what the tower is given: tiles, or frames."""
        processor = InternVLProcessor.from_pretrained(self.folder)
        text = processor.image_token if kind == "image" else processor.video_token
        return processor(text=text, **{f"{kind}s": [data]}, return_tensors="pt")["pixel_values"]

    def shuffled(self, patches: torch.Tensor) -> torch.Tensor:
        """Return [units, n, 4 c], of [units, 4 n, c]: four patches behind one another."""
        side = int(patches.shape[1] ** 0.5)
        square = patches.unflatten(1, (side, side)).contiguous()
        return self.model.model.pixel_shuffle(square).flatten(1, 2)


class InternVL:
    """The case."""

    name = "InternVLForConditionalGeneration"
    marks: Mapping[str, str] = {"image": "<IMG_CONTEXT>", "video": "<video>"}
    llm: Mapping[str, Any] = {}

    def save(self, folder: Path) -> None:
        """An InternViT tower of three layers, not normed; dynamic rope, as InternVL3 has it."""
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
        model = random_model(Qwen2Config, norm=False, rope_parameters=rope)
        save(folder, model, self.name, [*TOKENS.values()])
        names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
        save_tokenizer(
            folder,
            TOKENS,
            processor_class="InternVLProcessor",
            extra_special_tokens=dict(zip(names, TOKENS, strict=True)),
        )
        both = {
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "image_mean": [0.45] * 3,
            "image_std": [0.25] * 3,
            "size": {"height": TILE, "width": TILE},
        }
        images = {
            **both,
            "image_processor_type": "GotOcr2ImageProcessor",
            "crop_to_patches": False,  # which transformers' processor does not ask
            "min_patches": 1,
            "max_patches": 6,
        }
        videos = {**both, "video_processor_type": "InternVLVideoProcessor"}
        settings = {
            "image_processor": images,
            "video_processor": videos,
            "image_seq_length": (TILE // 28) ** 2,
            "processor_class": "InternVLProcessor",
        }
        for name, value in {
            "processor_config": settings,
            "preprocessor_config": images,
            "video_preprocessor_config": videos,
        }.items():
            (folder / f"{name}.json").write_text(json.dumps(value))

    def oracle(self, folder: Path) -> Oracle:
        """Load it."""
        return Oracle(folder)


def random_model(kind: type, *, norm: bool, **more: Any) -> InternVLForConditionalGeneration:
    """Return InternVL with random weights.

    Args:
        kind: Config class of its language model.
        norm: Whether the tower's queries and keys are normed.
        more: Further fields of that config.
    """
    torch.manual_seed(0)
    vision = InternVLVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        attention_bias=True,
        use_qk_norm=norm,
        image_size=(TILE, TILE),
        patch_size=(14, 14),
        initializer_range=0.2,  # so that heads differ, see random_llava.py
        layer_scale_init_value=1.0,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=language(kind, VOCABULARY, **more),
        image_token_id=TOKENS["<IMG_CONTEXT>"],
        image_seq_length=(TILE // 28) ** 2,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings)  # 0: patches are equal
    for layer in model.model.vision_tower.encoder.layer if norm else ():
        nn.init.constant_(layer.attention.q_norm.weight, 4.0)  # or heads look alike again
    return model


CASE: Final = InternVL()
