"""The small Qwen3-VL: its sizes, a batch of tasks, and how it sees and speaks.

The modules are transformers' own, called as they are: the tower with each picture a sequence of its
own, the language model with a mask and positions of packed rows (``packing.py``). A visual token is
16 x 16 pixels, 2 x 2 patches of 8. The folder that it is saved in is what transformers and vLLM
load: weights in bfloat16, the tokenizer, the chat template, and processors that leave a picture
whose sides are multiples of 16 as it is. Leaves out the loop (``loop.py``).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from era_vllm.lab.dummy_qwen import processor_files
from era_vllm.lab.synth.film import Item
from era_vllm.lab.synth.questions import TaskFamily
from era_vllm.lab.synth.tasks import QUOTAS, SIDE_STEP, Kind, Task
from era_vllm.lab.train import words
from era_vllm.lab.train.arch import Learner, save_weights
from era_vllm.lab.train.batch import Batch, padded
from era_vllm.lab.train.decoder import last_states
from era_vllm.lab.train.labels import label
from era_vllm.lab.train.packing import Form, Row
from era_vllm.lab.train.recipe import Recipe, Stage
from era_vllm.lab.train.tower import TokenHeads

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
_PLACES: Final = 12  # of the learnt grid of positions
_TOWER: Final = 128
_WIDTH: Final = 192
_LEVELS: Final = [1, 3]

TEXT: Final = {
    "vocab_size": words.VOCABULARY_SIZE,
    "hidden_size": _WIDTH,
    "intermediate_size": 448,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "pad_token_id": words.PAD,
    "bos_token_id": words.TURN,
    "eos_token_id": words.END,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
}
VISION: Final = {
    "depth": 6,
    "hidden_size": _TOWER,
    "intermediate_size": 512,
    "num_heads": 4,
    "hidden_act": "gelu",
    "patch_size": PATCH,
    "temporal_patch_size": FRAMES,
    "spatial_merge_size": MERGE,
    "num_position_embeddings": _PLACES**2,
    "out_hidden_size": _WIDTH,
    "deepstack_visual_indexes": _LEVELS,
}
FORM: Final = Form(
    opening="<|im_start|>user\n",
    asked="<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    next_turn="\n<|im_start|>user\n",
    marks=("<|vision_start|>", "<|vision_end|>"),
    pads=("<|image_pad|>", "<|video_pad|>"),
    side=SIDE_STEP,
    grid=True,
    filler=True,
)
_MIX: Final[Mapping[Kind, float]] = {"picture": 0.5, "several": 0.22, "film": 0.28}
_QUOTAS: Final[Mapping[TaskFamily, int]] = {
    **QUOTAS, "color": 2, "where": 1, "chart": 1, "relation": 4
}  # fmt: skip
"""Of learning: what is learnt first is asked less, what comes late more."""


def item_patches(item: Item) -> tuple[Tensor, Tensor]:
    """Return a picture's or a video's patches [p, 384] and grid [1, 3], as the tower takes them."""
    frames = item.frames if item.seconds else item.frames * FRAMES
    stacked = np.stack([np.asarray(frame, np.uint8) for frame in frames])
    pixels = stacked.astype(np.float32) / (255 * STD) - MEAN / STD  # [frames, h, w, 3]
    grid = len(frames) // FRAMES, *(side // PATCH for side in pixels.shape[1:3])
    rows, columns = (side // MERGE for side in grid[1:])
    cut = pixels.reshape(-1, FRAMES, rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    flat = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * FRAMES * PATCH * PATCH)
    return torch.from_numpy(flat), torch.tensor([grid])


class Qwen3VL(Learner):
    """The model and the heads of its tower."""

    form = FORM
    dev: ClassVar[Mapping[Kind, int]] = {"picture": 72, "several": 64, "film": 64}
    recipe = Recipe(
        tower=30_000,
        small=70_000,
        alone=Stage({"picture": 0.88, "film": 0.12}, {"picture": 24, "film": 12}, small=True),
        first=Stage(_MIX, {"picture": 14, "several": 10, "film": 8}, small=True),
        still_alone=0.35,
        quotas=_QUOTAS,
        then=Stage(_MIX, {"picture": 12, "several": 9, "film": 8}),
    )
    tokenizer = staticmethod(words.tokenizer)

    def __init__(self) -> None:
        super().__init__()
        config = Qwen3VLConfig(
            text_config=TEXT,
            vision_config=VISION,
            image_token_id=words.IMAGE,
            video_token_id=words.VIDEO,
            vision_start_token_id=words.VISION_START,
            vision_end_token_id=words.VISION_END,
            tie_word_embeddings=True,
        )
        self.model = Qwen3VLForConditionalGeneration(config)
        self.heads = TokenHeads(_WIDTH, 1 + len(_LEVELS))
        with torch.no_grad():
            grid = self.model.model.visual.pos_embed.weight
            grid.copy_(waves(_PLACES, _TOWER))

    def see(self, batch: Batch) -> list[Tensor]:
        """Return the tower's outputs, [v, width] each: the main one, then DeepStack's."""
        seen = self.model.model.visual(batch.pixels, grid_thw=batch.grids, return_dict=True)
        return [seen.pooler_output, *seen.deepstack_features]

    def tower_loss(self, batch: Batch, outputs: list[Tensor]) -> dict[str, Tensor]:
        """Return the loss of all outputs, and what the main one gets right."""
        return self.heads(outputs, batch.labels)

    def speak(self, batch: Batch, outputs: list[Tensor]) -> Tensor:
        language = self.model.model.language_model
        visual = (batch.ids == words.IMAGE) | (batch.ids == words.VIDEO)
        return last_states(language, batch, batch.positions, visual, outputs)

    @staticmethod
    def batch(tasks: Sequence[Task], rows: Sequence[Row] = ()) -> Batch:
        items = [item for task in tasks for item in task.items]
        seen = [item_patches(item) for item in items]
        labels = [label(scene, FORM.side) for item in items for scene in item.scenes]
        return Batch(
            pixels=torch.cat([pixels for pixels, _ in seen]),
            grids=torch.cat([grid for _, grid in seen]),
            labels=torch.from_numpy(np.concatenate(labels, 1)),
            present=torch.empty(0, 0, dtype=torch.int64),
            rows=tuple(rows),
            **padded(rows, words.PAD),
        )

    def export(self, folder: Path) -> None:
        weights = self.model.state_dict()
        del weights["lm_head.weight"]  # the embedding's
        save_weights(weights, folder / "model.safetensors")
        words.tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(words.CHAT_TEMPLATE, encoding="utf-8")
        for name, content in _files(self.model).items():
            text = json.dumps(content, indent=2) + "\n"
            (folder / name).write_text(text, encoding="utf-8")


ARCH: Final = Qwen3VL


def waves(side: int, width: int) -> Tensor:
    """Return sines and cosines of rows and columns, [side^2, width], to start positions from."""
    places = torch.arange(side, dtype=torch.float32)
    rates = torch.exp(-torch.arange(width // 4) / (width // 4) * np.log(100.0))
    angles = places[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None].expand(side, side, -1)
    return 0.1 * torch.cat([rows, columns], -1).reshape(side * side, width)


def _files(model: Any) -> Mapping[str, Mapping[str, object]]:
    config = model.config.to_dict()
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("_name_or_path", None)
    video = {"fps": 2, "min_frames": 2, "max_frames": 16, "cap_pixels_per_frame": False}
    return {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": words.TURN,
            "eos_token_id": words.END,
            "pad_token_id": words.PAD,
            "top_k": 1,
        },
        **processor_files(PATCH, _PICTURE, _VIDEO, video),
        "tokenizer_config.json": {
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
