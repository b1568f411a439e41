"""Losses on single visual tokens, for each of the tower's outputs: what makes it see quickly.

Heads are thrown away after training. Place stays in the loss to the end: without it a tower
forgets where things are, and questions about places are never learnt.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from era_vllm.lab.train.labels import SIZES

_BACKGROUND: tuple[float, ...] = (0.3, 0.2, 0.2, 1.0, 1.0)
"""Weight of "nothing" in each label; places have none."""
_SHARE: tuple[float, ...] = (1.0, 1.0, 1.0, 0.5, 0.5)
_OF_MAPS = 0.3
"""Weight of a DeepStack map beside the main output."""


class TokenHeads(nn.Module):
    """A linear head on the main output and on each DeepStack map."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(outputs))
        self.heads = nn.ModuleList(nn.Linear(width, sum(SIZES)) for _ in range(outputs))

    def forward(self, outputs: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the loss, "tower", and how often kind and value (of what has one), row and column
        are right.

        Args:
            outputs: [tokens, width] each, the main one first.
            labels: [5, tokens].
        """
        found = [
            head(norm(output)).float().split(SIZES, -1)
            for output, norm, head in zip(outputs, self.norms, self.heads, strict=True)
        ]
        main, *maps = (_loss(scores, labels) for scores in found)
        hits = [score.argmax(-1) == label for score, label in zip(found[0], labels, strict=True)]
        return {
            "tower": sum((_OF_MAPS * loss for loss in maps), start=main),
            "kind": hits[0][labels[0] > 0].float().mean(),
            "value": hits[2][labels[2] > 0].float().mean().nan_to_num(),
            "row": hits[3].float().mean(),
            "column": hits[4].float().mean(),
        }


def _loss(scores: Sequence[Tensor], labels: Tensor) -> Tensor:
    total = scores[0].new_zeros(())
    for score, label, share, background in zip(scores, labels, _SHARE, _BACKGROUND, strict=True):
        weights = score.new_ones(score.shape[-1])
        weights[0] = background
        total = total + share * F.cross_entropy(score, label, weight=weights)
    return total
