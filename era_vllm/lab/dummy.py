"""A model of any size without weights: config, processor and tokenizer, for ``load_format``
``"dummy"``. What it takes to time a model that cannot be downloaded; its answers mean nothing.

LLaVA-1.5 and LLaVA-NeXT have the tower of CLIP-L/14-336, with 576 tokens a tile; InternVL has
InternViT-300M's, with 256; Qwen3-VL its own (``dummy_qwen.py``), with a token for 32 x 32 pixels.
What is no size, and the tokenizer, are the shipped sample's. Leaves out timing (``bench/``).
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from era_vllm.lab import CHECKPOINT, dummy_qwen

MAX_CONTEXT: Final = 4096
"""Of the language model: LLaVA-1.5's."""
IMAGE_SIZE: Final = 336
IMAGE_TOKENS: Final = 576
"""Of CLIP-L/14-336: 24 x 24."""
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
    """Of the vision tower in front of it; 24 is CLIP-L, and Qwen3-VL-2B's."""
    kv_heads: int | None = None
    """None = as many as heads."""

    @property
    def head_dim(self) -> int:
        """Of a head."""
        return self.head_size or self.hidden // self.heads

    @property
    def width(self) -> int:
        """Of all heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of all heads of keys together, or of values."""
        return (self.kv_heads or self.heads) * self.head_dim

    @property
    def parameters(self) -> int:
        """Parameters of the layers, embeddings left out (the vocabulary is tiny)."""
        attention = 2 * self.hidden * (self.width + self.kv_width)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


SIZES: Final[Mapping[str, LlamaSize]] = {
    "0.9b": LlamaSize(),
    "0.2b": LlamaSize(layers=4, tower_layers=6),
    "7b": LlamaSize(4096, 11008, 32, 32),
    "qwen3-vl-2b": LlamaSize(2048, 6144, 28, 16, kv_heads=8),
    "tiny": LlamaSize(256, 512, 2, 2, tower_layers=4),
}
"""Names for the command line. ``7b`` is LLaVA-1.5-7B, ``0.2b`` a quarter of the layers of ``0.9b``
and of its tower; ``tiny`` tries a command, times nothing."""


def size_of(shape: str, family: str = "llava") -> LlamaSize:
    """Return a shape as a family has it: Qwen3-VL's ``0.2b`` is a quarter of ``qwen3-vl-2b``."""
    if (family, shape) == ("qwen3-vl", "0.2b"):
        return replace(SIZES["qwen3-vl-2b"], layers=7, tower_layers=6)
    return SIZES[shape]


@dataclass(frozen=True, slots=True)
class DummyFamily:
    """What is asked of a family: one picture of a size that makes tiles."""

    architecture: str
    picture: tuple[int, int]
    """Height and width in pixels."""
    tokens: int
    """Of that picture, unpruned, newlines included."""
    mark: str = "<image>"
    """What stands for it in a prompt."""
    tower: str = "CLIP-L/14-336"
    tiles: int = 1
    language: str = "Llama"
    context: int = MAX_CONTEXT
    """Of the language model."""
    unit: int | None = None
    """Pixels a side of a token, where a picture may have any size."""
    modalities: tuple[str, ...] = ("image",)
    """That the architecture takes."""

    def of_side(self, side: int) -> "DummyFamily":
        """Return the same with square pictures of so many pixels a side, a multiple of unit."""
        assert self.unit is not None
        return replace(self, picture=(side, side), tokens=(side // self.unit) ** 2)


FAMILIES: Final[Mapping[str, DummyFamily]] = {
    "llava": DummyFamily("LlavaForConditionalGeneration", (336, 336), IMAGE_TOKENS),
    "llava-next": DummyFamily("LlavaNextForConditionalGeneration", (672, 672), 2928, tiles=5),
    "internvl": DummyFamily(
        *("InternVLForConditionalGeneration", (896, 896), 1280, "<IMG_CONTEXT>"),
        tower="InternViT-300M",
        tiles=5,
        modalities=("image", "video"),
    ),
    "qwen3-vl": DummyFamily(
        *("Qwen3VLForConditionalGeneration", (1024, 1024), 1024, dummy_qwen.MARKS["image"]),
        tower="Qwen3-VL-2B's tower",
        language="Qwen3",
        context=dummy_qwen.CONTEXT,
        unit=dummy_qwen.UNIT,
        modalities=("image", "video"),
    ),
}
"""Names for the command line: LLaVA-1.5; an overview, 4 tiles and 48 newlines; 4 tiles and a
thumbnail; 1,024 x 1,024 pixels, or others."""
_PINPOINTS: Final = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_INTERN_TOKENS: Final = {"<img>": 128, "</img>": 129, "<IMG_CONTEXT>": 130, "<video>": 131}


def make_dummy(
    folder: Path, size: LlamaSize | None = None, family: str = "llava", tokens: int | None = None
) -> None:
    """Write a checkpoint folder without weights.

    Args:
        folder: Made if need be.
        size: Of the language model.
        family: One of ``FAMILIES``.
        tokens: Of the largest picture, where a picture may have any size: an engine's start runs
            the tower for it. None = the family's.

    Mutates: the config, the processor's and the tokenizer's files in folder.
    """
    size = size or LlamaSize()
    files = _llava(size)
    config, processor = files["config.json"], files["processor_config.json"]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(CHECKPOINT / name, folder / name)
    if family == "llava-next":
        own = {"image_grid_pinpoints": _PINPOINTS}
        kind = {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True}
        processor["image_processor"] |= {**kind, **own}
        processor["processor_class"] = "LlavaNextProcessor"
        config |= {"model_type": "llava_next", "architectures": [FAMILIES[family].architecture]}
        config |= own
    elif family == "internvl":
        files = _internvl(size, config, processor["image_processor"])
        names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
        special = {"extra_special_tokens": dict(zip(names, _INTERN_TOKENS, strict=True))}
        files |= _tokenizer(_INTERN_TOKENS, {"processor_class": "InternVLProcessor", **special})
    elif family == "qwen3-vl":
        tokens = tokens or FAMILIES[family].tokens
        text, dtype = config["text_config"], config["dtype"]
        files = dummy_qwen.config_files(text, dtype, size.tower_layers, tokens)
        files |= _tokenizer(dummy_qwen.TOKENS, dummy_qwen.tokenizer_settings())
        (folder / "chat_template.jinja").write_text(dummy_qwen.CHAT, encoding="utf-8")
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _read(name: str) -> dict[str, Any]:
    """Return a file of the shipped checkpoint."""
    return json.loads((CHECKPOINT / name).read_text(encoding="utf-8"))


def _tokenizer(
    tokens: Mapping[str, int], settings: Mapping[str, object]
) -> dict[str, dict[str, Any]]:
    """Return the sample's files with further tokens, by their ids, and settings."""
    table = _read("tokenizer.json")
    for token, number in tokens.items():
        table["model"]["vocab"][token] = number
        table["added_tokens"].append({**table["added_tokens"][-1], "id": number, "content": token})
    config = {**_read("tokenizer_config.json"), **settings}
    return {"tokenizer.json": table, "tokenizer_config.json": config}


def _llava(size: LlamaSize) -> dict[str, dict[str, Any]]:
    config, processor = _read("config.json"), _read("processor_config.json")
    config["image_seq_length"] = IMAGE_TOKENS
    config["vision_config"] = {**CLIP_L, "num_hidden_layers": size.tower_layers}
    config["text_config"] |= {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads or size.heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": MAX_CONTEXT,
    }
    processor["image_processor"] |= {
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "size": {"shortest_edge": IMAGE_SIZE},
    }
    return {"config.json": config, "processor_config.json": processor}


def _internvl(
    size: LlamaSize, config: Mapping[str, Any], image: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return files with InternViT-300M's tower of 448 pixels, 4 tiles at most, its tokens."""
    side = 448
    vision = {
        "model_type": "internvl_vision",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": size.tower_layers,
        "num_attention_heads": 16,
        "attention_bias": True,
        "image_size": [side, side],
        "patch_size": [14, 14],
    }
    own = {
        "architectures": [FAMILIES["internvl"].architecture],
        "model_type": "internvl",
        "text_config": {**config["text_config"], "vocab_size": 128 + len(_INTERN_TOKENS)},
        "vision_config": vision,
        "image_token_id": _INTERN_TOKENS["<IMG_CONTEXT>"],
        "image_seq_length": 256,
        "dtype": config["dtype"],
        "tie_word_embeddings": False,
    }
    both = {name: image[name] for name in ("image_mean", "image_std", "do_normalize", "do_resize")}
    both |= {"do_rescale": True, "do_convert_rgb": True, "size": {"height": side, "width": side}}
    images = {"image_processor_type": "GotOcr2ImageProcessor", "min_patches": 1, "max_patches": 4}
    images |= {**both, "crop_to_patches": True}
    videos = {**both, "video_processor_type": "InternVLVideoProcessor"}
    parts = {"image_processor": images, "video_processor": videos, "image_seq_length": 256}
    return {"config.json": own, **dummy_qwen.files_of(parts, "InternVLProcessor")}
