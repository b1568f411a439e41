"""Where signals come from: one file a source. The pipeline sees values only."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from era_vllm.types import Signal
from era_vllm.vllm_plugin.fields import Planned


class SignalSource(Protocol):
    """Gives signals of the items of one pass through the encoder."""

    @property
    def gives(self) -> frozenset[Signal]:
        """The signals."""
        ...

    def before(self, items: Sequence[Planned]) -> None:
        """Get ready for a pass of these items; what an earlier pass may have left is forgotten."""
        ...

    def after(
        self, items: Sequence[Planned], rows: Sequence[Tensor]
    ) -> Mapping[Signal, Sequence[Tensor]]:
        """Return each signal for each item of the pass.

        Of tokens: float32 [c, length] or [h, dh, length]; of segments: int64 [segments].

        Args:
            rows: [length, d + r] of each item, as the encoder gave them.
        """
        ...
