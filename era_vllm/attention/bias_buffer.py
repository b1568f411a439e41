"""One step's biases at fixed addresses, shared by all layers (graph inputs under CUDA graphs).

Written once a step, where vLLM embeds the step's tokens; read by every attention layer as the
columns that are appended. Rows of text and of padding hold bias 0.
"""

import torch
from jaxtyping import Bool, Float32
from torch import Tensor, nn

from era_vllm.contracts import BiasStore


class BiasBuffer(nn.Module):
    """Bias columns of the tokens of one step."""

    columns: Tensor
    """[rows, width], model dtype: what the layers append."""
    neutral: Tensor
    """[1, width]: a row of bias 0."""

    def __init__(
        self, rows: int, width: int, store: BiasStore, scale: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.store = store
        self.scale = scale
        neutral = store.columns(torch.zeros(1, dtype=torch.float32), width, scale, dtype)
        self.register_buffer("columns", neutral.repeat(rows, 1), persistent=False)
        self.register_buffer("neutral", neutral.clone(), persistent=False)
        self._dirty = False

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
        width, dtype = self.columns.shape[1], self.columns.dtype
        self.columns[:tokens] = self.store.columns(step, width, self.scale, dtype)
        self._dirty = True
