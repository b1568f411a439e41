"""Write the folder of a trained Qwen3-VL: what transformers and vLLM load.

Weights in bfloat16 under the names that both read, the tokenizer, the chat template, and processors
that leave a picture whose sides are multiples of 16 as it is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import nn

from era_vllm.lab.synth.tasks import SIDE_STEP
from era_vllm.lab.train import words
from era_vllm.lab.train.arch import save_weights

PATCH: Final = 8
"""Pixels."""
MERGE: Final = 2
"""Patches of a token's side."""
FRAMES: Final = 2
"""Of a moment; a picture is one twice."""
MEAN = STD = 0.5
"""Of pixels from 0 to 1."""
CONTEXT: Final = 4096
_AREA: Final = SIDE_STEP * SIDE_STEP
_PICTURE: Final = (16 * _AREA, 121 * _AREA)
"""Fewest and most pixels of a picture: it was trained on 16 to 110 tokens."""
_VIDEO: Final = (2 * 16 * _AREA, 16 * 42 * _AREA)
"""Of all frames of a video together."""
_TIED: Final = "lm_head.weight"


def export(model: nn.Module, folder: Path) -> None:
    """Write a model's weights, as they are now, and all that belongs to them."""
    weights = {name: weight for name, weight in model.state_dict().items() if name != _TIED}
    save_weights(weights, folder / "model.safetensors")
    words.tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(words.CHAT_TEMPLATE, encoding="utf-8")
    for name, content in _files(model).items():
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def _files(model: nn.Module) -> Mapping[str, Mapping[str, object]]:
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("_name_or_path", None)
    both = {
        "patch_size": PATCH,
        "temporal_patch_size": FRAMES,
        "merge_size": MERGE,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    images = {
        **both,
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": _PICTURE[0], "longest_edge": _PICTURE[1]},
    }
    videos = {
        **both,
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"shortest_edge": _VIDEO[0], "longest_edge": _VIDEO[1]},
        "fps": 2,
        "min_frames": 2,
        "max_frames": 16,
        "cap_pixels_per_frame": False,
    }
    return {
        "config": config,
        "generation_config": {
            "bos_token_id": words.TURN,
            "eos_token_id": words.END,
            "pad_token_id": words.PAD,
            "top_k": 1,
        },
        "processor_config": {
            "image_processor": images,
            "video_processor": videos,
            "processor_class": "Qwen3VLProcessor",
        },
        "preprocessor_config": images,
        "video_preprocessor_config": videos,
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Qwen3VLProcessor",
            "eos_token": words.SPECIAL[words.END],
            "pad_token": words.SPECIAL[words.PAD],
            "unk_token": words.SPECIAL[words.UNKNOWN],
            "extra_special_tokens": {
                "vision_start_token": words.SPECIAL[words.VISION_START],
                "vision_end_token": words.SPECIAL[words.VISION_END],
                "image_token": words.SPECIAL[words.IMAGE],
                "video_token": words.SPECIAL[words.VIDEO],
            },
            "model_max_length": CONTEXT,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        },
    }
