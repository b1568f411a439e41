"""Dense rectified attention in float32: slow, obvious, and what every kernel is compared with.

Source: ERA Sec. "LAR"; the same form as proportional attention (Bolya et al. 2023,
arXiv:2210.09461, Sec. 3). Leaves out paging: keys come in the order of their positions.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor


def rectified_attention(
    query: Float[Tensor, "t hq dh"],
    key: Float[Tensor, "s hkv dh"],
    value: Float[Tensor, "s hkv dv"],
    log_bias: Float32[Tensor, "s"] | Float32[Tensor, "s hkv"],
    scale: float,
    *,
    causal: bool = True,
) -> Float[Tensor, "t hq dv"]:
    """Return softmax(scale q.k + log_bias) v per head, in the queries' dtype.

    Args:
        query: The last t of s positions; hq is a multiple of hkv (grouped queries).
        key: All s positions.
        value: All s positions.
        log_bias: Natural log added to the scores of each key, or of each key and KV head (where
            exponents differ); 0 = none.
        scale: Softmax scale, usually dh ** -0.5.
        causal: Whether a query sees only keys at its own position or before.
    """
    groups = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(groups, dim=1)
    values = value.float().repeat_interleave(groups, dim=1)
    if log_bias.ndim == 2:
        log_bias = log_bias.T.repeat_interleave(groups, dim=0)[:, None]
    scores = torch.einsum("thd,shd->hts", query.float(), keys) * scale + log_bias
    if causal:
        steps, length = query.shape[0], key.shape[0]
        position = torch.arange(length, device=query.device)
        future = position > position[length - steps :, None]
        scores = scores.masked_fill(future, -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), values).to(query.dtype)
