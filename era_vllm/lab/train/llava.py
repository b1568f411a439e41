"""The shipped LLaVA-1.5: its sizes, a batch of pictures, and how it sees and speaks.

The config, tokenizer and processor are the shipped checkpoint's; only weights are new. Pictures are
the first generator's (168 x 168 pixels, patches of 14, nine families); a prompt is one picture and
one question, and positions are moved about, so that a language model does not learn them by heart.
Leaves out the loop (``loop.py``).
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration

from era_vllm.lab import CHECKPOINT
from era_vllm.lab.synth.questions import FAMILIES, TaskFamily
from era_vllm.lab.synth.tasks import Kind, Task
from era_vllm.lab.train.arch import Learner, save_weights
from era_vllm.lab.train.batch import Batch, padded
from era_vllm.lab.train.decoder import last_states
from era_vllm.lab.train.labels import THINGS, label, things
from era_vllm.lab.train.packing import Form, Row
from era_vllm.lab.train.recipe import Recipe, Stage
from era_vllm.lab.train.tower import TokenHeads

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORM: Final = Form(
    opening="<s> USER :",
    asked=" ASSISTANT :",
    end="</s>",
    next_turn="",
    marks=("", ""),
    pads=("<image>", ""),
    side=14,
    grid=False,
    filler=False,
)
_MEAN, _STD = 0.45, 0.25
_PAD, _IMAGE = 0, 4
_OF_CLASS: Final = 10.0
"""Weight of what the class token says: most of its classes are absent from most pictures."""
QUOTAS: Final[Mapping[TaskFamily, int]] = {
    **dict.fromkeys(FAMILIES, 1), "exist": 2, "count": 2, "spatial": 2, "where": 2, "chart": 2
}  # fmt: skip
_NAMES: Final = {
    "model.vision_tower": "vision_tower.vision_model",
    "model.language_model": "language_model.model",
    "model.multi_modal_projector": "multi_modal_projector",
    "lm_head": "language_model.lm_head",
}
"""transformers' names of modules, and those that vLLM reads too."""


def pictures(tasks: Sequence[Task], rows: Sequence[Row] = ()) -> Batch:
    """Return pictures of one size, alone or with a packed row for each."""
    scenes = [task.items[0].scenes[0] for task in tasks]
    frames = [np.asarray(task.items[0].frames[0], np.float32) for task in tasks]
    pixels = (np.stack(frames) / 255 - _MEAN) / _STD
    labels = np.concatenate([label(scene, FORM.side) for scene in scenes], 1)
    return Batch(
        pixels=torch.from_numpy(pixels.astype(np.float32).transpose(0, 3, 1, 2).copy()),
        grids=torch.empty(0, 3, dtype=torch.int64),
        labels=torch.from_numpy(labels),
        present=torch.from_numpy(np.stack([things(scene) for scene in scenes])),
        rows=tuple(rows),
        **padded(rows, _PAD),
    )


class Llava(Learner):
    """The model, heads of its patches, and one of its class token."""

    form = FORM
    dev: ClassVar[Mapping[Kind, int]] = {"standard": 160}
    recipe = Recipe(
        tower=20_000,
        small=20_000,
        alone=Stage({"standard": 1.0}, {"standard": 24}),
        first=Stage({"standard": 1.0}, {"standard": 16}),
        then=Stage({"standard": 1.0}, {"standard": 16}),
        quotas=QUOTAS,
    )
    batch = staticmethod(pictures)

    def __init__(self) -> None:
        super().__init__()
        config = LlavaConfig.from_pretrained(CHECKPOINT)
        self.model = LlavaForConditionalGeneration(config)
        width = config.vision_config.hidden_size
        self.heads = TokenHeads(width, 1)
        self.class_heads = nn.Linear(width, THINGS)

    def see(self, batch: Batch) -> list[Tensor]:
        """Return patches of the last layer but one [v, width], and class tokens [b, width]."""
        seen = self.model.model.vision_tower(batch.pixels, output_hidden_states=True)
        return [seen.hidden_states[-2][:, 1:].flatten(0, 1), seen.pooler_output]

    def tower_loss(self, batch: Batch, outputs: list[Tensor]) -> dict[str, Tensor]:
        """Return the loss of patches and class token, and what patches get right."""
        found = self.heads(outputs[:1], batch.labels)
        present = batch.present.float()
        of_class = F.binary_cross_entropy_with_logits(self.class_heads(outputs[1]).float(), present)
        return {**found, "tower": found["tower"] + _OF_CLASS * of_class, "class": of_class}

    def speak(self, batch: Batch, outputs: list[Tensor]) -> Tensor:
        model, visual = self.model.model, batch.ids == _IMAGE
        seen = [model.multi_modal_projector(outputs[0])]
        return last_states(model.language_model, batch, batch.positions[0], visual, seen)

    @staticmethod
    def tokenizer() -> "Tokenizer":
        """Load the shipped checkpoint's."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))

    def export(self, folder: Path) -> None:
        """Write the weights beside copies of the shipped checkpoint's other files."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in CHECKPOINT.iterdir():
            if file.suffix in {".json", ".jinja"}:
                shutil.copyfile(file, folder / file.name)
        weights = {
            f"{shared}.{name}": weight
            for own, shared in _NAMES.items()
            for name, weight in self.model.get_submodule(own).state_dict().items()
        }
        save_weights(weights, folder / "model.safetensors")


ARCH: Final = Llava
