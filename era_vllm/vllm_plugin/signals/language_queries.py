"""Queries of the language model's first layer, of each visual token alone.

Before its rotary embedding, which turns all heads of a token alike. Under tensor parallelism ranks'
heads are gathered, so that every rank chooses the same anchors.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from era_vllm.types import Signal
from era_vllm.vllm_plugin.fields import Planned
from era_vllm.vllm_plugin.signals.first_layer import FirstLayer
from era_vllm.vllm_plugin.signals.ranks import all_heads


class LanguageQueries:
    """Gives them for the rows of a pass."""

    gives: Final = frozenset({Signal.LANGUAGE_QUERIES})

    def __init__(self, language_model: nn.Module, width: int | None) -> None:
        """Find the layer.

        Args:
            width: Columns of a row that are the token; None = all.

        Raises:
            UnsupportedError: a first layer that is another rank's, or makes queries otherwise.
        """
        self._layer, self._width = FirstLayer(language_model), width

    def before(self, items: Sequence[Planned]) -> None:
        """Nothing to get ready."""

    def after(
        self, items: Sequence[Planned], rows: Sequence[Tensor]
    ) -> Mapping[Signal, Sequence[Tensor]]:
        """Return float32 [hq, dh, length] of each item."""
        tokens = torch.cat([own[:, : self._width] for own in rows])
        queries = all_heads(self._layer.queries(tokens))
        of_items = queries.split([len(own) for own in rows])
        return {Signal.LANGUAGE_QUERIES: [one.permute(1, 2, 0) for one in of_items]}
