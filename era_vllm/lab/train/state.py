"""What training can be gone on with: weights, their average, optimizers, and how far it is.

One file, written beside the last one and then put in its place; the last one is kept. Leaves out
the folder that a model is exported to (``arch.py``).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from era_vllm.errors import ConfigError

FILE: Final = "state.pt"
_BEFORE: Final = "state.before.pt"


@dataclass(slots=True)
class Progress:
    """How far training is."""

    arch: str
    seed: int
    step: int = 0
    seen: int = 0
    """Tasks."""
    minutes: float = 0.0
    from_text: bool = False
    """Without what a recipe begins with."""


class Average:
    """Weights averaged over steps: better than the last ones while the learning rate is high."""

    def __init__(self, model: nn.Module, decay: float = 0.998) -> None:
        self._decay = decay
        self._live = list(model.parameters())
        self.weights = [weight.detach().clone() for weight in self._live]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights as they are after so many steps."""
        decay = min(self._decay, (1 + steps) / (10 + steps))
        for weight, live in zip(self.weights, self._live, strict=True):
            weight.lerp_(live, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights with the averages; again: back."""
        for live, average in zip(self._live, self.weights, strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)


def save(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    average: Average,
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Write the state; the one before is kept beside it."""
    state: dict[str, Any] = {
        "progress": asdict(progress),
        "model": model.state_dict(),
        "average": average.weights,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    new = folder / f"{FILE}.new"
    torch.save(state, new)
    if (folder / FILE).exists():
        (folder / FILE).replace(folder / _BEFORE)
    new.replace(folder / FILE)


def load(
    folder: Path,
    wanted: Progress,
    model: nn.Module,
    average: Average,
    optimizers: Sequence[torch.optim.Optimizer],
) -> Progress:
    """Read a state into these.

    Args:    wanted: Architecture and seed that it has to be of.
    Raises: ConfigError: no state there, or another's.
    Mutates: model, average, optimizers.
    """
    file = folder / FILE
    if not file.is_file():
        raise ConfigError(
            f"--resume: no {FILE} in {str(folder)!r}; name a folder that era-vllm train wrote to, "
            "or begin with weights alone (--weights)"
        )
    state = torch.load(file, map_location="cpu", weights_only=True)
    progress = Progress(**state["progress"])
    for name in ("arch", "seed"):
        has, got = getattr(progress, name), getattr(wanted, name)
        if has != got:
            raise ConfigError(f"--resume: {str(file)!r} is of --{name} {has}, got {got}")
    model.load_state_dict(state["model"])
    copied: list[Tensor] = state["average"]
    for weight, kept in zip(average.weights, copied, strict=True):
        weight.copy_(kept)
    for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    return progress
