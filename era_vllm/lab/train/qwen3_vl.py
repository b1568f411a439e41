"""The small Qwen3-VL: its sizes, a batch of tasks, its losses, and the folder it is saved in.

The modules are transformers' own, called as they are: the tower with each picture a sequence of its
own, the language model with a mask and positions of packed rows (``packing.py``). A visual token is
16 x 16 pixels, 2 x 2 patches of 8. Leaves out the loop (``loop.py``).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from era_vllm.lab.synth.tasks import Task
from era_vllm.lab.train import words
from era_vllm.lab.train.labels import label
from era_vllm.lab.train.packing import NO_TARGET, Row, pack
from era_vllm.lab.train.tower import TokenHeads

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PATCH: Final = 8
MERGE: Final = 2
FRAMES: Final = 2
MEAN = STD = 0.5
CONTEXT: Final = 4096
_HIDDEN_PER_SIDE: Final = 12  # of the learnt grid of positions

TEXT: Final = {
    "vocab_size": words.VOCABULARY_SIZE,
    "hidden_size": 192,
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
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_heads": 4,
    "hidden_act": "gelu",
    "patch_size": PATCH,
    "temporal_patch_size": FRAMES,
    "spatial_merge_size": MERGE,
    "num_position_embeddings": _HIDDEN_PER_SIDE**2,
    "out_hidden_size": 192,
    "deepstack_visual_indexes": [1, 3],
}


def config() -> Qwen3VLConfig:
    """Return the config."""
    return Qwen3VLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=words.IMAGE,
        video_token_id=words.VIDEO,
        vision_start_token_id=words.VISION_START,
        vision_end_token_id=words.VISION_END,
        tie_word_embeddings=True,
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """Tasks as tensors; b rows of n tokens, p patches, v visual tokens."""

    pixels: Tensor
    """[p, 3 x 2 x 8 x 8]"""
    grids: Tensor
    """[items, 3]: moments, rows and columns of patches."""
    labels: Tensor
    """[5, v]"""
    ids: Tensor
    """[b, n]"""
    positions: Tensor
    """[3, b, n]"""
    mask: Tensor
    """[b, 1, n, n], added to scores."""
    targets: Tensor
    """[b, n]"""
    rows: tuple[Row, ...]

    def to(self, device: str | torch.device) -> "Batch":
        """Return it on a device."""
        moved = {
            field.name: getattr(self, field.name).to(device)
            for field in fields(self)
            if field.name != "rows"
        }
        return replace(self, **moved)


def patches(frames: Sequence[Any]) -> "np.ndarray":
    """Cut a picture, or the two frames of a moment, as Qwen3-VL's processor does: [p, 384]."""
    both = [np.asarray(frame, np.uint8) for frame in (frames[0], frames[-1])]
    pixels = np.stack(both).astype(np.float32) / (255 * STD) - MEAN / STD  # [2, h, w, 3]
    rows, columns = (side // (PATCH * MERGE) for side in pixels.shape[1:3])
    cut = pixels.reshape(FRAMES, rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    return cut.transpose(1, 4, 2, 5, 7, 0, 3, 6).reshape(-1, 3 * FRAMES * PATCH * PATCH)


def collate(tasks: Sequence[Task], rows: Sequence[Row]) -> Batch:
    """Put tasks and their packed rows into tensors."""
    pixels: list[np.ndarray] = []
    grids: list[tuple[int, int, int]] = []
    labels: list[np.ndarray] = []
    for task in tasks:
        for item in task.items:
            moments = [item.frames[i : i + FRAMES] for i in range(0, len(item.frames), FRAMES)]
            pixels += [patches(frames) for frames in moments]
            width, height = item.frames[0].size
            grids.append((len(moments), height // PATCH, width // PATCH))
            labels += [label(scene) for scene in item.scenes]
    longest = max((len(row.ids) for row in rows), default=0)
    shape = (len(rows), longest)
    ids = np.full(shape, words.PAD, np.int64)
    targets = np.full(shape, NO_TARGET, np.int64)
    owners = np.full(shape, -1, np.int64)
    positions = np.zeros((3, *shape), np.int64)
    for index, row in enumerate(rows):
        end = len(row.ids)
        ids[index, :end], targets[index, :end] = row.ids, row.targets
        owners[index, :end], positions[:, index, :end] = row.owners, row.positions
    owner = torch.from_numpy(owners)
    seen = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
    seen &= torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -1e9)[:, None]
    return Batch(
        torch.from_numpy(np.concatenate(pixels)),
        torch.tensor(grids),
        torch.from_numpy(np.concatenate(labels, 1)),
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        mask,
        torch.from_numpy(targets),
        tuple(rows),
    )


class Trained(nn.Module):
    """The model and the heads of its tower."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Qwen3VLForConditionalGeneration(config())
        self.heads = TokenHeads(VISION["out_hidden_size"], 1 + len(VISION["deepstack_visual_indexes"]))
        with torch.no_grad():
            visual = self.model.model.visual
            visual.pos_embed.weight.copy_(_waves(_HIDDEN_PER_SIDE, VISION["hidden_size"]))

    def read(self, folder: Path) -> None:
        """Take the weights of an exported folder; the heads stay as they are."""
        self.model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    def see(self, batch: Batch) -> list[Tensor]:
        """Return the tower's outputs, [v, width] each: the main one, then DeepStack's."""
        seen = self.model.model.visual(batch.pixels, grid_thw=batch.grids, return_dict=True)
        return [seen.pooler_output, *seen.deepstack_features]

    def answer(self, batch: Batch, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return scores [t, vocabulary] and what is right [t], where something is to be said."""
        language = self.model.model.language_model
        visual = (batch.ids == words.IMAGE) | (batch.ids == words.VIDEO)
        embeds = language.embed_tokens(batch.ids)
        embeds = embeds.masked_scatter(visual[..., None], outputs[0])
        hidden = language(
            inputs_embeds=embeds,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            visual_pos_masks=visual,
            deepstack_visual_embeds=outputs[1:],
            use_cache=False,
        ).last_hidden_state
        told = batch.targets != NO_TARGET
        return self.model.lm_head(hidden[told]), batch.targets[told]

    def losses(self, batch: Batch, with_text: bool) -> dict[str, Tensor]:
        """Return losses by name (they add up to what is minimised), and shares that are right."""
        outputs = self.see(batch)
        tower, right = self.heads(outputs, batch.labels)
        names = ("kind", "value", "row", "column")
        found = {"tower": tower, **{name: right[i] for i, name in enumerate(names)}}
        if with_text:
            scores, wanted = self.answer(batch, outputs)
            found["text"] = F.cross_entropy(scores, wanted)
            found["token"] = (scores.detach().argmax(-1) == wanted).float().mean()
        return found


def batch_of(
    tasks: Sequence[Task], tokenizer: "Tokenizer", lots: random.Random, plain: bool = False
) -> Batch:
    """Pack tasks and put them into tensors; those without a question are left out."""
    asked = [task for task in tasks if task.questions]
    return collate(asked, [pack(task, tokenizer, lots, plain=plain) for task in asked])


def _waves(side: int, width: int) -> Tensor:
    """Return sines and cosines of rows and columns, [side^2, width], to start positions from."""
    places = torch.arange(side, dtype=torch.float32)
    rates = torch.exp(-torch.arange(width // 4) / (width // 4) * np.log(100.0))
    angles = places[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None].expand(side, side, -1)
    return 0.1 * torch.cat([rows, columns], -1).reshape(side * side, width)
