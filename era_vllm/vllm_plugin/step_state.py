"""One step's biases and offsets: from packed rows to buffers at fixed addresses.

Written where vLLM embeds a step's tokens; read by every attention layer (``attention/layer.py``)
and by the model's forward.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from era_vllm.attention.bias_buffer import BiasBuffer
from era_vllm.vllm_plugin.injection import InjectedStates
from era_vllm.vllm_plugin.packing import unpack
from era_vllm.vllm_plugin.positions import AnchorOffsets


class StepState(nn.Module):
    """What the step's anchors bring along."""

    def __init__(
        self,
        bias_buffer: BiasBuffer,
        axes: int,
        table_rows: int,
        injected: InjectedStates | None = None,
    ) -> None:
        """Make the state beside a bias buffer.

        Args:
            axes: p, those of a position.
            table_rows: Of the rotary table.
            injected: Of layers whose output is replaced; None = of none.
        """
        super().__init__()
        self.bias_buffer = bias_buffer
        self.anchor_offsets = AnchorOffsets(bias_buffer.columns.shape[0], axes, table_rows)
        self.injected = injected
        self._axes = axes

    def clear(self) -> None:
        """Forget: a step without visual tokens."""
        self.bias_buffer.clear()
        self.anchor_offsets.clear()
        if self.injected is not None:
            self.injected.clear()

    def write(self, packed: Sequence[Tensor], is_visual: Bool[Tensor, "t"]) -> list[Tensor]:
        """Set what the step's anchors brought along, and return the rows that vLLM merges.

        Args:
            packed: [k, d + c] each: the step's share of each item.
            is_visual: True at the step's visual tokens.
        """
        rows, log_bias, offsets = unpack(torch.cat(list(packed)), self._axes)
        self.bias_buffer.write(is_visual, log_bias)
        self.anchor_offsets.write(is_visual, offsets)
        if self.injected is not None:
            behind = self.injected.columns
            rows, states = rows.split([rows.shape[1] - behind, behind], 1)
            self.injected.write(is_visual, states)
        return list(rows.split([len(own) for own in packed]))
