"""The values that travel: image -> VisualTokens -> Clusters -> PrunedTokens.

Every tensor carries a leading segment axis: a segment is the unit that is pruned alone (an image,
a tile, a frame). The pipeline is given segments of equal length, so no value here is ragged.
Dims: s segments, n visual tokens, a anchors, d language-model width, hv vision heads.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from jaxtyping import Float, Float32, Int
from torch import Tensor


class Signal(Enum):
    """Extra input that a policy may need; an adapter says which it provides."""

    ENCODER_ATTENTION = "encoder attention"
    ENCODER_SCORES = "encoder attention scores"
    PIXEL_HASH = "pixel hash"


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """Segments of equal length as the projector gives them, with the signals a policy may use."""

    embeds: Float[Tensor, "s n d"]
    """Projector output in the model's dtype."""
    grid: tuple[int, int]
    """Rows and columns of the token grid, raster order; rows x columns = n."""
    attention: Float32[Tensor, "s hv n"] | None = None
    """Attention that each token receives per vision head: softmax over keys, mean over queries."""
    scores: Float32[Tensor, "s hv n"] | None = None
    """Attention score (before softmax) of each key per vision head, mean over queries."""
    seeds: Int[Tensor, "s"] | None = None
    """A hash of each segment's pixel values, int64: the only source of chance a policy may use."""

    @property
    def segments(self) -> int:
        """s, the number of segments."""
        return self.embeds.shape[0]

    @property
    def n(self) -> int:
        """n, the visual tokens of each segment."""
        return self.embeds.shape[1]

    @property
    def signals(self) -> frozenset[Signal]:
        """The signals that are present."""
        given = {
            Signal.ENCODER_ATTENTION: self.attention,
            Signal.ENCODER_SCORES: self.scores,
            Signal.PIXEL_HASH: self.seeds,
        }
        return frozenset(signal for signal, value in given.items() if value is not None)


@dataclass(frozen=True, slots=True)
class Clusters:
    """Every token assigned to the anchor that it is merged into."""

    anchors: Int[Tensor, "s a"]
    """Original indices of the retained tokens, ascending (raster order)."""
    assignment: Int[Tensor, "s n"]
    """Original token -> row of its anchor in ``anchors``; -1 = dropped."""
    embeds: Float[Tensor, "s a d"]
    """Merged embeddings in the model's dtype."""
    sizes: Int[Tensor, "s a"]
    """Tokens in each cluster, its anchor included: at least 1."""


@dataclass(frozen=True, slots=True)
class PrunedTokens:
    """What replaces a segment's visual tokens in the language model."""

    embeds: Float[Tensor, "s a d"]
    """Retained embeddings in the model's dtype."""
    log_bias: Float32[Tensor, "s a"]
    """Natural log added to the attention score of each anchor's key: >= 0, 0 = none."""
    anchors: Int[Tensor, "s a"]
    """Original indices of the anchors, ascending."""
    assignment: Int[Tensor, "s n"]
    """Original token -> row of its anchor; -1 = dropped."""
    degenerate: Int[Tensor, "counts"]
    """How many values of each kind of bad input were repaired, in the order of ``Degenerate``."""


class Degenerate(IntEnum):
    """Kinds of bad input that are repaired and counted, never raised (one image of many)."""

    NON_FINITE_EMBEDS = 0
    NON_FINITE_ATTENTION = 1
    NO_ATTENTION = 2
    TOO_FEW_TOKENS = 3


DEGENERATE_KINDS: Final = len(Degenerate)
