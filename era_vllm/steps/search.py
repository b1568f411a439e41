"""Greedy searches over a Gram matrix: one loop over the a steps, batched over segments.

Both are nested (fewer anchors = a subset), deterministic, and send ties to the lowest index.
Indices come back ascending: raster order, which the causal mask of the language model needs.
"""

from typing import Final

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.steps.similarity import quantize

_SPENT: Final = 1e-5
_LARGE: Final = 1 << 19
"""Entries of a segment's factor from which a CPU takes its products by BLAS, with a call for each
segment: one for all would go by their number, and a segment's sums would depend on its neighbours.
"""


def farthest_first(
    gram: Float32[Tensor, "s n n"],
    penalty: Float32[Tensor, "s n"],
    num_anchors: int,
    *,
    weight: float = 1.0,
    multiplicative: bool = False,
    quality: Float32[Tensor, "s n"] | None = None,
) -> Int[Tensor, "s a"]:
    """Pick the token of least penalty, then repeatedly the best of distance against penalty.

    Args:
        gram: Cosine similarities; distance = 1 - similarity to the nearest anchor so far.
        penalty: In [0, 1].
        num_anchors: a, in [1, n].
        weight: alpha; distance - alpha penalty is what the next anchor has most of.
        multiplicative: distance (1 - penalty) instead.
        quality: Multiplies a token's distance; None = 1.

    Source: ERA Sec. "DEP", "entropy-penalised greedy search"; reconstructed (docs/method.md, X6).
    """
    picked = [penalty.argmin(-1)]
    taken = torch.zeros_like(penalty, dtype=torch.bool)
    nearest = torch.full_like(penalty, torch.inf)
    for _ in range(num_anchors - 1):
        taken.scatter_(1, picked[-1][:, None], True)
        nearest = torch.minimum(nearest, 1.0 - _row(gram, picked[-1]))
        far = nearest if quality is None else nearest * quality
        score = far * (1.0 - penalty) if multiplicative else far - weight * penalty
        picked.append(score.masked_fill(taken, -torch.inf).argmax(-1))
    return torch.stack(picked, 1).sort(-1).values


def dpp_map(
    kernel: Float32[Tensor, "s n n"],
    first: Int[Tensor, "s"],
    num_anchors: int,
    quality: Float32[Tensor, "s n"] | None = None,
) -> Int[Tensor, "s a"]:
    """Greedy MAP of a determinantal point process by pivoted Cholesky.

    Args:
        kernel: Positive definite; its diagonal is the gain of a first token.
        first: The first anchor of each segment.
        num_anchors: a, in [1, n].
        quality: q > 0 of each token: the kernel is q_i L_ij q_j, whose determinants are those of L
            times each q squared, so that no factor of it is small; None = 1.

    Source: Chen et al. 2018, arXiv:1709.05135, Alg. 1; differs: the first item is given.
    """
    segments, n, _ = kernel.shape
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    factor = kernel.new_zeros(segments, num_anchors, n)
    taken = torch.zeros_like(gain, dtype=torch.bool)
    weight = None if quality is None else quality.square()
    picked = [first]
    for step in range(num_anchors - 1):
        last = picked[-1][:, None]
        taken.scatter_(1, last, True)
        done = factor[:, :step]
        column = done.gather(2, last[:, None].expand(-1, step, -1))
        if step * n > _LARGE and kernel.device.type == "cpu":
            products = [part.T @ one for part, one in zip(done, column[..., 0], strict=True)]
            known = torch.stack(products)
        else:
            known = (done * column).sum(1)
        pivot = gain.gather(1, last)
        row = (_row(kernel, picked[-1]) - known) / pivot.clamp_min(_SPENT).sqrt()
        # What is left of a spent pivot is rounding noise, which would grow from step to step.
        row = torch.where(pivot > _SPENT, row, 0.0)
        factor[:, step] = row
        gain = gain - row.square()
        score = quantize(gain) if weight is None else quantize(gain) * weight
        picked.append(score.masked_fill(taken, -torch.inf).argmax(-1))
    return torch.stack(picked, 1).sort(-1).values


def _row(matrix: Float32[Tensor, "s n n"], index: Int[Tensor, "s"]) -> Float32[Tensor, "s n"]:
    return matrix.gather(1, index[:, None, None].expand(-1, 1, matrix.shape[-1])).squeeze(1)
