"""Muon for matrices, its work shared out over ranks; AdamW for the rest.

torch.optim.Muon orthogonalises in bfloat16, which a CPU without AMX does a hundred times slower
than float32, and every rank would do all of it. Here matrices of one shape go through it together,
in float32, each rank's share. The update is torch's (`adjust_lr_fn="match_rms_adamw"`).
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

from era_vllm.lab.train.ranks import Ranks

_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
_STEPS: Final = 5
_NOT_MUON: Final = ("embed", "heads.", "patch_embed", "lm_head")
_WIDEST: Final = 2**17
"""Numbers of a matrix that Muon is worth its time for; larger ones (the mergers') are AdamW's."""


class SharedMuon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; each rank orthogonalises its share of the matrices."""

    def __init__(
        self, matrices: Iterable[Tensor], ranks: Ranks, lr: float, weight_decay: float
    ) -> None:
        super().__init__(list(matrices), {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self._ranks = ranks

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step."""
        assert closure is None
        for group in self.param_groups:
            momentum: list[Tensor] = []
            for matrix in group["params"]:
                assert matrix.grad is not None
                average = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                momentum.append(matrix.grad.lerp(average, group["momentum"]))
            for matrix, update in zip(group["params"], self._orthogonal(momentum), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)

    def _orthogonal(self, matrices: list[Tensor]) -> list[Tensor]:
        found = [torch.zeros_like(matrix) for matrix in matrices]
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, matrix in enumerate(matrices):
            by_shape[min(matrix.shape), max(matrix.shape)].append(index)
        for indices in by_shape.values():
            own = indices[self._ranks.rank :: self._ranks.count]
            if not own:
                continue
            chosen = [matrices[index] for index in own]
            wide = [one if one.shape[0] <= one.shape[1] else one.T for one in chosen]
            for index, update in zip(own, orthogonalised(torch.stack(wide)), strict=True):
                found[index] = update if found[index].shape == update.shape else update.T
        return self._ranks.added(found)


def orthogonalised(wide: Tensor) -> Tensor:
    """Return matrices with the same singular vectors and singular values near 1.

    Args:    wide: [k, m, n], m <= n.
    Source:  Jordan et al. 2024, "Muon", Newton-Schulz of degree five; as torch.optim.Muon.
    """
    a, b, c = _COEFFICIENTS
    x = wide / wide.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def optimizers(model: nn.Module, ranks: Ranks, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon and AdamW for a model's parameters, which are float32."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        fit = parameter.ndim == 2 and parameter.numel() <= _WIDEST
        fit = fit and not any(part in name for part in _NOT_MUON)
        (matrices if fit else others).append(parameter)
    return [
        SharedMuon(matrices, ranks, lr, weight_decay=0.02),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
