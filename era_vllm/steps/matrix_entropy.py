"""Matrix entropy of a token's rows, one a head: how many directions they are spread over.

Source: EntropyPrune (arXiv:2602.17196): covariance of what the heads hold, its spectrum's entropy;
by the dual Gram matrix, which has the same spectrum but for zeros and is heads x heads.
"""

import math
from typing import Final, cast

import torch
from jaxtyping import Float32, Float64
from torch import Tensor
from torch.nn.functional import pad

_LEAST: Final = 1e-10
"""Of an eigenvalue, so that its logarithm is a number."""
_NUMBERS: Final = 2**22
"""Of the rows at once: 32 MiB in float64."""
_ROW: Final = 8  # float64 values in 64 bytes: see ``similarity``


def matrix_entropy(
    rows: Float32[Tensor, "s h dh n"], *, trace_norm: bool = True
) -> Float64[Tensor, "s n"]:
    """Return -sum l ln l / ln h over the spectrum l of each token; 0 with a single head.

    Args:
        rows: Of each token and head; their mean over heads is taken off.
        trace_norm: Divide the spectrum by its sum, so that the length of rows does not matter.
    """
    segments, heads, size, n = rows.shape
    if heads == 1:
        return torch.zeros(segments, n, dtype=torch.float64, device=rows.device)
    of_tokens = rows.permute(0, 3, 1, 2).flatten(0, 1)
    at_once = max(1, _NUMBERS // (heads * size))
    starts = range(0, len(of_tokens), at_once)
    spectra = [_spectrum(of_tokens[one : one + at_once], trace_norm) for one in starts]
    spectrum = torch.cat(spectra).clamp_min(_LEAST)
    entropy = -(spectrum * spectrum.log()).sum(-1) / math.log(heads)
    return entropy.view(segments, n)


def _spectrum(rows: Float32[Tensor, "t h dh"], trace_norm: bool) -> Float64[Tensor, "t h"]:
    heads = rows.shape[1]
    centred = rows.double()
    centred = centred - centred.mean(1, keepdim=True)
    # Zeros add eigenvalues of 0, which are cut off again.
    centred = pad(centred, (0, -rows.shape[2] % _ROW, 0, -heads % _ROW))
    gram = centred @ centred.transpose(1, 2) / heads
    if trace_norm:
        trace = gram.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
        gram = gram / torch.where(trace > 0, trace, 1.0)
    spectrum = cast(Tensor, torch.linalg.eigvalsh(gram))  # type: ignore[no-untyped-call]
    return spectrum[:, -heads:]
