"""Cosine similarity that gives one segment the same bits whatever stands beside it.

Two facts of CPU matrix products, both measured, shape this file: a product's bits change with the
memory alignment of its operands (so rows are padded to 64 bytes), and a product with one column
takes another kernel for one segment than for several (so there is none here). On a GPU bits may
still change with the batch.
"""

from typing import Final

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.nn.functional import pad

_ROW: Final = 16  # float32 values in 64 bytes
_STEPS: Final = 2.0**20


def unit(x: Float[Tensor, "s n d"]) -> Float32[Tensor, "s n p"]:
    """Return unit rows in float32, padded with zeros to p, a multiple of 16; a zero row stays zero.

    Safe for the largest finite values: rows are scaled before they are squared.
    """
    x = x.float()
    top = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(top > 0, top, 1.0)
    norm = x.square().sum(-1, keepdim=True).sqrt()
    return pad(x / torch.where(norm > 0, norm, 1.0), (0, -x.shape[-1] % _ROW))


def length(x: Float[Tensor, "s n d"]) -> Float32[Tensor, "s n"]:
    """Return the length of each row as a fraction of (about) its segment's longest; never inf."""
    x = x.float()
    top = x.abs().amax((1, 2), keepdim=True)
    return (x / torch.where(top > 0, top, 1.0)).square().sum(-1).sqrt()


def gram(x: Float32[Tensor, "s n p"]) -> Float32[Tensor, "s n n"]:
    """Return x xT of padded rows, rounded to 2**-20.

    Equal tokens tie whatever noise (about 1e-7) a matrix product leaves on them, unless it falls
    on both sides of a rounding step. So their ties go to the lowest index; tokens that are merely
    placed symmetrically may not.
    """
    return quantize(x @ x.transpose(1, 2))


def nearest_anchor(
    x: Float32[Tensor, "s n p"],
    anchors: Int[Tensor, "s a"],
    lengths: Float32[Tensor, "s n"] | None = None,
) -> Int[Tensor, "s n"]:
    """Return for each token the row of the most similar anchor; anchors get their own.

    Args:
        x: Padded unit rows.
        anchors: Indices into n.
        lengths: Of the original rows, for the dot product in place of the cosine (a token's own
            length does not change the order of its anchors).
    """
    segments, num_anchors = anchors.shape
    if num_anchors == 1:
        return torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    similarity = _to_anchors(x, anchors)
    if lengths is not None:
        similarity = similarity * lengths.gather(1, anchors)[:, None]
    best = quantize(similarity).argmax(-1)
    own = torch.arange(num_anchors, device=x.device).expand(segments, -1)
    return best.scatter(1, anchors, own)


def to_anchors(
    x: Float32[Tensor, "s n p"], anchors: Int[Tensor, "s a"]
) -> Float32[Tensor, "s n a"]:
    """Return the similarity of each token to each anchor, rounded to 2**-20.

    Args:
        x: Padded unit rows.
        anchors: Indices into n.
    """
    return quantize(_to_anchors(x, anchors))


def _to_anchors(
    x: Float32[Tensor, "s n p"], anchors: Int[Tensor, "s a"]
) -> Float32[Tensor, "s n a"]:
    picked = x.gather(1, anchors[..., None].expand(-1, -1, x.shape[-1]))
    if anchors.shape[1] == 1:
        return (x * picked).sum(-1, keepdim=True)
    return x @ picked.transpose(1, 2)


def quantize(x: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """Round to 2**-20: differences of rounding become exact ties."""
    return (x * _STEPS).round() / _STEPS
