"""A LLaVA-1.5 of any size without weights: config, processor and tokenizer, for ``load_format``
``"dummy"``. What it takes to time a model that cannot be downloaded; its answers mean nothing.

The vision tower is CLIP-L/14-336's, so an image has 576 tokens. What is no size, and the
tokenizer, are the shipped sample's. Leaves out timing (``bench/``).
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from era_vllm.lab import CHECKPOINT

MAX_CONTEXT: Final = 4096
"""Of the language model: LLaVA-1.5's."""
IMAGE_SIZE: Final = 336
IMAGE_TOKENS: Final = 576
"""Of CLIP-L/14-336: 24 x 24."""
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CLIP_L: Final[Mapping[str, object]] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": IMAGE_SIZE,
    "patch_size": 14,
    "projection_dim": 768,
}
"""Config of the CLIP-L/14-336 vision tower."""


@dataclass(frozen=True, slots=True)
class LlamaSize:
    """The language model's shape; the defaults make 0.9 billion parameters."""

    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 17
    heads: int = 16
    head_size: int | None = None
    """None = hidden / heads."""
    tower_layers: int = 24
    """Of the vision tower in front of it; 24 is CLIP-L."""

    @property
    def parameters(self) -> int:
        """Parameters of the layers, embeddings left out (the vocabulary is tiny)."""
        attention = 4 * self.hidden * self.heads * (self.head_size or self.hidden // self.heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


SIZES: Final[Mapping[str, LlamaSize]] = {
    "0.9b": LlamaSize(),
    "7b": LlamaSize(4096, 11008, 32, 32),
    "tiny": LlamaSize(256, 512, 2, 2, tower_layers=4),
}
"""Names for the command line. ``7b`` is LLaVA-1.5-7B; ``tiny`` tries a command, times nothing."""


def make_dummy_llava(folder: Path, size: LlamaSize | None = None) -> None:
    """Write a checkpoint folder without weights.

    Args:
        folder: Made if need be.
        size: Of the language model.

    Mutates: config.json, processor_config.json and the tokenizer's files in folder.
    """
    size = size or LlamaSize()
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(CHECKPOINT / name, folder / name)
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    config["image_seq_length"] = IMAGE_TOKENS
    config["vision_config"] = {**CLIP_L, "num_hidden_layers": size.tower_layers}
    config["text_config"] |= {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "head_dim": size.head_size or size.hidden // size.heads,
        "max_position_embeddings": MAX_CONTEXT,
    }
    _write(folder / "config.json", config)
    processor = json.loads((CHECKPOINT / "processor_config.json").read_text(encoding="utf-8"))
    image = processor["image_processor"]
    image["crop_size"] = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image["size"] = {"shortest_edge": IMAGE_SIZE}
    _write(folder / "processor_config.json", processor)


def _write(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
