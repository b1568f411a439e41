"""What a folder of Qwen3-VL without weights holds: its config, and what its processor reads.

The tower is Qwen3-VL-2B's: 1,024 wide, a token for 32 x 32 pixels, feature maps of three layers
(DeepStack). The fields are those of the published config. Leaves out the language model's size and
the tokenizer (``dummy.py``).
"""

from collections.abc import Mapping
from typing import Any, Final

CONTEXT: Final = 262_144
"""Positions of the language model."""
UNIT: Final = 32
"""Pixels a side of a token: 2 x 2 patches of 16."""
TOKENS: Final = {
    "<|vision_start|>": 128,
    "<|vision_end|>": 129,
    "<|image_pad|>": 130,
    "<|video_pad|>": 131,
}
"""Behind the sample's vocabulary."""
MARKS: Final = {
    kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")
}
"""What stands for an item in a prompt."""
CHAT: Final = "{% for m in messages %}USER: {{ m['content'] }} {% endfor %}ASSISTANT:"
"""Chat template; vLLM puts the marks before the text."""


def tokenizer_settings() -> dict[str, object]:
    """Return what the tokenizer's config says of the tokens."""
    names = {name.strip("<|>").replace("pad", "token"): name for name in TOKENS}
    return {"processor_class": "Qwen3VLProcessor", "extra_special_tokens": names}


def feature_layers(tower_layers: int, layers: int) -> list[int]:
    """Return the tower's layers of which maps are taken: 5, 11 and 17 of 24, or as far along.

    Args:
        tower_layers: Of the tower.
        layers: Of the language model: each of its first takes a map.
    """
    return [-(-(level + 1) * tower_layers // 24) - 1 for level in (5, 11, 17)][:layers]


def rotary_sections(head_dim: int) -> list[int]:
    """Return how many pairs of a head each axis turns: 24, 20 and 20 of a head of 128."""
    other = head_dim * 20 // 128
    return [head_dim // 2 - 2 * other, other, other]


def config_files(
    text: Mapping[str, Any], dtype: str, tower_layers: int, tokens: int
) -> dict[str, dict[str, object]]:
    """Return files by name.

    Args:
        text: Sizes of the language model, by the fields of its config.
        dtype: Of the weights.
        tower_layers: Of the tower; the layers of its feature maps move with them.
        tokens: Of the largest picture, and of the largest video.
    """
    start, end, image, video = TOKENS.values()
    rope = {
        "rope_type": "default",
        "rope_theta": 5_000_000,
        "mrope_section": rotary_sections(text["head_dim"]),
        "mrope_interleaved": True,
    }
    more = {
        "model_type": "qwen3_vl_text",
        "vocab_size": end + 3,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": rope,
    }
    vision = {
        "model_type": "qwen3_vl_vision",
        "depth": tower_layers,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "out_hidden_size": text["hidden_size"],
        "deepstack_visual_indexes": feature_layers(tower_layers, text["num_hidden_layers"]),
    }
    config: dict[str, object] = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {**text, **more},
        "vision_config": vision,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
        "dtype": dtype,
        "tie_word_embeddings": False,
    }
    area = UNIT * UNIT
    pixels = min(64, tokens) * area, tokens * area
    of_video = 4 * area, 2 * tokens * area  # of all frames together, pairs of which are a token's
    return {"config.json": config, **processor_files(16, pixels, of_video)}


def processor_files(
    patch: int,
    picture: tuple[int, int],
    video: tuple[int, int],
    more: Mapping[str, object] | None = None,
) -> dict[str, dict[str, object]]:
    """Return the files of Qwen3-VL's processors by name.

    Args:
        patch: Pixels a side; 2 x 2 are a token.
        picture: Fewest and most pixels.
        video: The same, of all frames together.
        more: What else a video's says.
    """
    both: dict[str, object] = {
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    images = {
        **both,
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": picture[0], "longest_edge": picture[1]},
    }
    videos = {
        **both,
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"shortest_edge": video[0], "longest_edge": video[1]},
        **(more or {}),
    }
    return files_of({"image_processor": images, "video_processor": videos}, "Qwen3VLProcessor")


def files_of(parts: Mapping[str, Any], name: str) -> dict[str, dict[str, object]]:
    """Return a processor as vLLM and transformers read it: whole, and each part alone."""
    return {
        "processor_config.json": {**parts, "processor_class": name},
        "preprocessor_config.json": parts["image_processor"],
        "video_preprocessor_config.json": parts["video_processor"],
    }
