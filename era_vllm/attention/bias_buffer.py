"""One step's biases at fixed addresses, shared by all layers (graph inputs under CUDA graphs).

Written once a step, where vLLM embeds the step's tokens; read by every attention layer as the
columns that are appended. Rows of text and of padding hold bias 0. Where exponents (gamma) differ,
each layer and KV head has columns of its own, also written once a step: text steps and decode
steps cost nothing more, and the buffer grows by layers x KV heads.
"""

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from era_vllm.contracts import BiasStore


class BiasBuffer(nn.Module):
    """Bias columns of the tokens of one step."""

    columns: Tensor
    """[rows, l, h, width], model dtype: what is appended. Without exponents l = h = 1."""
    neutral: Tensor
    """[1, 1, 1, width]: bias 0."""
    gamma: Tensor | None
    """[l, h], float32: exponents of this rank's KV heads; None = 1 everywhere."""

    def __init__(
        self,
        rows: int,
        width: int,
        store: BiasStore,
        scale: float,
        dtype: torch.dtype,
        gamma: Float32[Tensor, "l h"] | None = None,
    ) -> None:
        super().__init__()
        self.store = store
        self.scale = scale
        layers, heads = (1, 1) if gamma is None else gamma.shape
        neutral = store.columns(torch.zeros(1, 1, 1, dtype=torch.float32), width, scale, dtype)
        self.register_buffer("columns", neutral.repeat(rows, layers, heads, 1), persistent=False)
        self.register_buffer("neutral", neutral.clone(), persistent=False)
        self.register_buffer("gamma", gamma, persistent=False)
        self._dirty = False

    def of_layer(self, layer: int, tokens: int) -> Float[Tensor, "t h w"]:
        """Return the columns of a layer (counted from 0) for the step's first t tokens."""
        return self.columns[:tokens, 0 if self.gamma is None else layer]

    def clear(self) -> None:
        """Set every row to bias 0; free on steps that follow a step without images."""
        if self._dirty:
            self.columns.copy_(self.neutral)
            self._dirty = False

    def write(self, is_visual: Bool[Tensor, "t"], log_bias: Float32[Tensor, "v"]) -> None:
        """Set the bias of the step's visual tokens, 0 elsewhere.

        Args:
            is_visual: True at the v tokens of the step that are anchors.
            log_bias: Their biases in the order of the tokens.

        Mutates: columns.
        """
        self.clear()
        tokens = is_visual.shape[0]
        device = self.columns.device
        step = torch.zeros(tokens, dtype=torch.float32, device=device)
        step.masked_scatter_(is_visual.to(device, non_blocking=True), log_bias)
        bias = step[:, None, None] if self.gamma is None else step[:, None, None] * self.gamma
        width, dtype = self.columns.shape[-1], self.columns.dtype
        self.columns[:tokens] = self.store.columns(bias, width, self.scale, dtype)
        self._dirty = True
