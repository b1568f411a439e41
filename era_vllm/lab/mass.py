"""How much attention falls on visual tokens, layer by layer: ``era-vllm eval --mass``.

The figure by which the paper shows what rectified attention restores. Plain transformers with the
additive mask (``oracle.py``): of the row that gives the first word of an answer, the share of its
attention on visual tokens, mean over heads and questions. LLaVA-1.5 checkpoints.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from era_vllm.config import EraConfig
from era_vllm.lab.asking import Subject, TransformersAsker
from era_vllm.lab.calibrate import attend
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.screen import bar


@dataclass(frozen=True, slots=True)
class Mass:
    """Shares of a row of an evaluation."""

    variant: str
    rate: float
    layers: list[float]
    """Of attention that falls on visual tokens, from layer 0."""

    def as_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return asdict(self)


def measure(
    oracle: Oracle,
    subjects: Sequence[Subject],
    rows: Sequence[tuple[str, EraConfig, float]],
) -> list[Mass]:
    """Return the mean shares over pictures and their questions, with a progress bar.

    Args:
        subjects: Of pictures.
        rows: (variant, its settings, rate) each.
    """
    shares: list[list[Tensor]] = [[] for _ in rows]
    with bar(len(rows) * len(subjects), "attention mass", "picture") as shown:
        for subject in subjects:
            for own, (_, config, rate) in zip(shares, rows, strict=True):
                for prompt in TransformersAsker(oracle, config).prompts(subject, rate):
                    seen = attend(
                        oracle, *prompt, bias=True, gamma=config.gamma, positions=config.positions
                    )
                    own.append(seen.share[..., -1].mean(1))  # of the last token, over heads
                shown.update()
    return [
        Mass(name, rate, torch.stack(own).mean(0).tolist())
        for own, (name, _, rate) in zip(shares, rows, strict=True)
    ]


def draw(path: Path, title: str, rows: Sequence[Mass]) -> None:
    """Draw the shares over layers, a line a row."""
    from matplotlib.figure import Figure

    figure = Figure((8, 4.5), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        label = f"{row.variant} at {row.rate:g}" if row.rate else row.variant
        style = {"marker": ".", "lw": 1} if row.rate else {"color": "black", "lw": 1.5}
        axis.plot([100 * share for share in row.layers], label=label, **style)
    axis.set_xlabel("layer of the language model")
    axis.set_ylabel("attention on visual tokens, %")
    axis.set_ylim(0)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
