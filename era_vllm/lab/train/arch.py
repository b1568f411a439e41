"""What a file of an architecture gives the loop. Adding one is a file with `ARCH`."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from era_vllm.errors import ConfigError, unknown_name
from era_vllm.lab.synth.tasks import Kind, Task
from era_vllm.lab.train import ARCHS
from era_vllm.lab.train.batch import Batch
from era_vllm.lab.train.optim import optimizers
from era_vllm.lab.train.packing import NO_TARGET, Form, Row, pack
from era_vllm.lab.train.ranks import Ranks
from era_vllm.lab.train.recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_OF_TOWER: Final = 0.3
"""Weight of the tower's losses beside the answers'."""


class Learner(nn.Module, ABC):
    """A model, and heads of its tower that are thrown away after training: a file's `ARCH`."""

    recipe: ClassVar[Recipe]
    dev: ClassVar[Mapping[Kind, int]]
    """Held-out tasks by kind."""
    form: ClassVar[Form]
    """How it writes a prompt."""
    weights_file: ClassVar[str] = "config.json"
    """What an exported folder is known by."""
    model: Any
    """transformers' own."""

    @staticmethod
    @abstractmethod
    def tokenizer() -> "Tokenizer":
        """Make the tokenizer."""

    @staticmethod
    @abstractmethod
    def batch(tasks: Sequence[Task], rows: Sequence[Row] = ()) -> Batch:
        """Return pictures, alone or with a packed row for each task."""

    @classmethod
    def asked(
        cls,
        tasks: Sequence[Task],
        words: "Tokenizer",
        lots: random.Random,
        wordy: bool = False,
        extra: int | None = None,
    ) -> Batch:
        """Return pictures and packed questions; tasks without a question are left out."""
        some = [task for task in tasks if task.questions]
        rows = [pack(task, cls.form, words, lots, wordy=wordy, extra=extra) for task in some]
        return cls.batch(some, rows)

    def read(self, folder: Path) -> None:
        """Take the weights of an exported folder; the heads stay as they are."""
        self.model = type(self.model).from_pretrained(folder, dtype=torch.float32)

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the folder that transformers and vLLM load."""

    def optimizers(self, ranks: Ranks, lr: float) -> list[torch.optim.Optimizer]:
        """Return what steps; a group's "share" is multiplied with the learning rate."""
        return optimizers(self, ranks, lr)

    @abstractmethod
    def see(self, batch: Batch) -> list[Tensor]:
        """Return the tower's outputs; the first is what the language model reads."""

    @abstractmethod
    def tower_loss(self, batch: Batch, outputs: list[Tensor]) -> dict[str, Tensor]:
        """Return "tower", a loss, and shares that are right by name."""

    @abstractmethod
    def speak(self, batch: Batch, outputs: list[Tensor]) -> Tensor:
        """Return the language model's last states where something is to be said, [t, d]."""

    def scored(self, states: Tensor) -> Tensor:
        """Return scores of the vocabulary, [t, vocabulary]."""
        return self.model.lm_head(states)

    def answer(self, batch: Batch, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return scores [t, vocabulary] and what is right [t], where something is to be said."""
        told = batch.targets != NO_TARGET
        return self.scored(self.speak(batch, outputs)), batch.targets[told]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss", what is minimised, its parts, and shares that are right, by name."""
        outputs = self.see(batch)
        found = self.tower_loss(batch, outputs)
        if not batch.rows:
            return {"loss": found["tower"], **found}
        scores, wanted = self.answer(batch, outputs)
        text = F.cross_entropy(scores.float(), wanted)
        token = (scores.detach().argmax(-1) == wanted).float().mean()
        return {"loss": text + _OF_TOWER * found["tower"], "text": text, "token": token, **found}


def architecture(name: str) -> type[Learner]:
    """Return the architecture of a name.

    Raises: ConfigError: there is none.
    """
    if name not in ARCHS:
        raise ConfigError(unknown_name("architecture", name, ARCHS))
    return import_module(f"era_vllm.lab.train.{name}").ARCH


def save_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    """Write weights in bfloat16; the folder is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in weights.items()
    }
    save_file(kept, file, {"format": "pt"})
