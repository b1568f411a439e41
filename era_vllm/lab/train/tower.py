"""Losses on single visual tokens, for each of the tower's outputs: what makes it see quickly.

Heads are thrown away after training. Place stays in the loss to the end: without it a tower
forgets where things are, and questions about places are never learnt.
"""

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
        total, right = outputs[0].new_zeros(()), {}
        for index, (output, norm, head) in enumerate(
            zip(outputs, self.norms, self.heads, strict=True)
        ):
            scores = head(norm(output)).float().split(SIZES, -1)
            loss = sum(
                share * F.cross_entropy(score, label, weight=self._weights(score, background))
                for score, label, share, background in zip(
                    scores, labels, _SHARE, _BACKGROUND, strict=True
                )
            )
            total = total + (1.0 if index == 0 else _OF_MAPS) * loss
            if index == 0:
                right = _right([score.detach() for score in scores], labels)
        return {"tower": total, **right}

    @staticmethod
    def _weights(score: Tensor, background: float) -> Tensor:
        weights = score.new_ones(score.shape[-1])
        weights[0] = background
        return weights


def _right(scores: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
    hits = [score.argmax(-1) == label for score, label in zip(scores, labels, strict=True)]
    return {
        "kind": hits[0][labels[0] > 0].float().mean(),
        "value": hits[2][labels[2] > 0].float().mean().nan_to_num(),
        "row": hits[3].float().mean(),
        "column": hits[4].float().mean(),
    }
