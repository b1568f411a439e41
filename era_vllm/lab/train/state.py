"""What training can be gone on with: weights, their average, optimizers, and how far it is.

One file, written beside the last one and then put in its place; the last one is kept. Leaves out
the folder that a model is exported to (``arch.py``).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

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

    def swap(self) -> None:
        """Exchange the model's weights with the averages; again: back."""
        for live, average in zip(self._live, self.weights, strict=True):
            live.data, average.data = average.data, live.data


@dataclass(frozen=True, slots=True)
class State:
    """All that is saved."""

    progress: Progress
    model: nn.Module
    average: Average
    optimizers: Sequence[torch.optim.Optimizer]

    def save(self, folder: Path) -> None:
        """Write the state; the one before is kept beside it."""
        state: dict[str, Any] = {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "average": self.average.weights,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        new = folder / f"{FILE}.new"
        torch.save(state, new)
        if (folder / FILE).exists():
            (folder / FILE).replace(folder / _BEFORE)
        new.replace(folder / FILE)

    def load(self, folder: Path) -> None:
        """Read a state into this one.

        Raises: ConfigError: no state there, or one of another architecture or seed.
        """
        file = folder / FILE
        if not file.is_file():
            raise ConfigError(
                f"--resume: no {FILE} in {str(folder)!r}; name a folder that era-vllm train wrote "
                "to, or begin with weights alone (--weights)"
            )
        state = torch.load(file, map_location="cpu", weights_only=True)
        for name in ("arch", "seed"):
            has, got = state["progress"][name], getattr(self.progress, name)
            if has != got:
                raise ConfigError(f"--resume: {str(file)!r} is of --{name} {has}, got {got}")
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)
        self.model.load_state_dict(state["model"])
        for weight, kept in zip(self.average.weights, state["average"], strict=True):
            weight.copy_(kept)
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
