"""The small Qwen3-VL in plain transformers, asked about tasks with tokens that a caller pruned.

For what no engine can be asked: tokens keep the positions that they have unpruned, whatever was
done to them. Leaves out the pruning (``joined_frames.py``, ``deepstack.py``).
"""

import random
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from era_vllm.lab import CHECKPOINT_QWEN3_VL
from era_vllm.lab.asking import Answer
from era_vllm.lab.oracle import LanguageOracle, Segment
from era_vllm.lab.synth.film import Item
from era_vllm.lab.synth.tasks import Task
from era_vllm.lab.train import words
from era_vllm.lab.train.export import FRAMES, PATCH
from era_vllm.lab.train.packing import pack
from era_vllm.lab.train.qwen3_vl import FORM, patches


class TaskOracle(LanguageOracle):
    """The shipped Qwen3-VL; a moment is a picture, or two frames of a video."""

    def __init__(self) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(
            CHECKPOINT_QWEN3_VL, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.dtype = torch.float32
        self._tokenizer = words.tokenizer()
        self._places = torch.empty(3, 0, dtype=torch.int64)

    @property
    def visual_tokens(self) -> list[int]:
        """The marks of a picture's token and of a video's."""
        return [words.IMAGE, words.VIDEO]

    def moment_rows(self, item: Item) -> Float[Tensor, "t n c"]:
        """Return each moment's tokens: main output, and behind it the feature maps."""
        frames = item.frames
        pixels = [patches(frames[at : at + FRAMES]) for at in range(0, len(frames), FRAMES)]
        width, height = frames[0].size
        grid = torch.tensor([[len(pixels), height // PATCH, width // PATCH]])
        seen = self.model.model.visual(
            torch.from_numpy(np.concatenate(pixels)), grid_thw=grid, return_dict=True
        )
        rows = torch.cat([seen.pooler_output, *seen.deepstack_features], -1)
        return rows.unflatten(0, (len(pixels), -1))

    def position_ids(self, *_: object) -> Int[Tensor, "3 t"]:
        """Return those of the tokens that are left, as they were unpruned."""
        return self._places

    def answer(
        self, task: Task, question: int, moments: Sequence[Segment], *, bias: bool = True
    ) -> Answer:
        """Answer one question greedily, all words at once as they should be."""
        asked = Task(task.kind, task.items, task.questions[question : question + 1])
        row = pack(asked, FORM, self._tokenizer, random.Random(0), extra=0)
        visual = np.flatnonzero(np.isin(row.ids, self.visual_tokens))
        left = np.ones(len(row.ids), bool)
        left[visual] = False
        starts = np.cumsum([0, *(moment.n for moment in moments)])
        for start, moment in zip(starts, moments, strict=False):
            left[visual[start + moment.anchors.numpy()]] = True
        self._places = torch.from_numpy(row.positions[:, left])
        first, end = row.spans[0]
        scores = self.log_probs(row.ids[left].tolist(), moments, end - first, bias=bias)
        right = (scores.argmax(-1).numpy() == row.targets[first:end]).all()
        kept = sum(len(moment.anchors) for moment in moments)
        return Answer(asked.questions[0].answer if right else "", kept)


GRID_STEP: Final = FORM.side
"""Pixels of a token's side."""
