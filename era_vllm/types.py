"""The values that travel: image -> VisualTokens -> Clusters -> PrunedTokens.

Every tensor carries a leading segment axis: a segment is the unit that is pruned alone (an image,
a tile, a frame). The pipeline is given segments of equal length, so no value here is ragged.
Dims: s segments, n visual tokens, a anchors, d language-model width, r rider width, c channels of
a signal (hv, the vision heads).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from typing import Final

from jaxtyping import Float, Float32, Int
from torch import Tensor


class Signal(Enum):
    """Extra input that a policy may need. A new one is a member here and the source that gives it.

    Of each token: float32 [s, c, n], or [s, h, dh, n] head by head. Of a whole segment: int64 [s]
    (``PIXEL_HASH``).
    """

    ENCODER_ATTENTION = "encoder attention"
    """Attention that each token receives per vision head: softmax over keys, mean over queries."""
    ENCODER_SCORES = "encoder attention scores"
    """Attention score (before softmax) of each key per vision head, mean over queries."""
    CLASS_ATTENTION = "attention of the encoder's class token"
    """Attention that each token receives from the class token per vision head; in a tower without
    one the mean over all queries. Whatever ``EraConfig.attention_queries`` is."""
    ENCODER_KEYS = "encoder keys"
    """Key of each token per vision head, [s, hv, dh, n], as the tower's attention sees it."""
    LANGUAGE_QUERIES = "queries of the language model's first layer"
    """Query of each token per head, [s, hq, dh, n], before its rotary embedding: of that token
    alone, since nothing has been attended to yet. Of a later layer where the policy says so
    (``contracts.ReadsLayer``): of the picture alone, behind ``EraConfig.scout_prefix``."""
    SCOUT_STATES = "states of the scout"
    """Output of the language model's layer ``EraConfig.scout``, run on the picture alone,
    [s, d, n]: what tokens are compared by where it is given."""
    SCOUT_LAYERS = "states of each of the scout's layers"
    """Output of each of those layers, [s, k d, n], before what the model adds behind it: what is
    injected (``EraConfig.scout_injection``); no policy sees it."""
    RELEVANCE = "relevance to the question"
    """How much what is asked of the item attends to each token, [s, 1, n], >= 0; 0 for all of a
    segment = nothing is asked, and nobody may tell tokens apart by it."""
    PIXEL_HASH = "pixel hash"
    """A hash of each segment's pixel values: the only source of chance a policy may use."""


NOT_NEGATIVE: Final = frozenset(
    {Signal.ENCODER_ATTENTION, Signal.CLASS_ATTENTION, Signal.RELEVANCE}
)
"""Signals that are 0 or more."""
OF_ENCODER: Final = frozenset(
    {
        Signal.ENCODER_ATTENTION,
        Signal.ENCODER_SCORES,
        Signal.CLASS_ATTENTION,
        Signal.ENCODER_KEYS,
    }
)
"""Signals that are read in a layer of the vision tower."""
OF_LANGUAGE_MODEL: Final = frozenset({Signal.LANGUAGE_QUERIES, Signal.RELEVANCE})
"""Signals that are computed with the language model's weights."""
OF_EVERY_MODEL: Final = OF_LANGUAGE_MODEL | {Signal.PIXEL_HASH}
"""Signals that need no tower."""


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """Segments of equal length as the projector gives them, with the signals a policy may use."""

    embeds: Float[Tensor, "s n d"]
    """Projector output in the model's dtype: what tokens are compared by."""
    grid: tuple[int, int]
    """Rows and columns of the token grid, raster order; rows x columns = n."""
    signals: Mapping[Signal, Tensor] = field(default_factory=dict[Signal, Tensor])
    """What the sources gave; a policy names what it needs."""
    riders: Float[Tensor, "s n r"] | None = None
    """Further columns of each token (feature maps for later layers): averaged, never compared."""

    @property
    def segments(self) -> int:
        """s, the number of segments."""
        return self.embeds.shape[0]

    @property
    def n(self) -> int:
        """n, the visual tokens of each segment."""
        return self.embeds.shape[1]

    def signal(self, signal: Signal) -> Float32[Tensor, "s c n"]:
        """Return a signal of each token; the pipeline has checked that it is there."""
        return self.signals[signal]

    def by_head(self, signal: Signal) -> Float32[Tensor, "s h dh n"]:
        """Return keys or queries of each token, likewise."""
        return self.signals[signal]

    @property
    def compared(self) -> "VisualTokens":
        """What a policy is given: by the scout's states, where there are any, it compares.

        What is averaged are the rows themselves.
        """
        states = self.signals.get(Signal.SCOUT_STATES)
        return self if states is None else replace(self, embeds=states.transpose(1, 2))

    @property
    def pixel_hash(self) -> Int[Tensor, "s"]:
        """The hash of each segment's pixel values."""
        return self.signals[Signal.PIXEL_HASH]


@dataclass(frozen=True, slots=True)
class Clusters:
    """Every token assigned to the anchor that it is merged into."""

    anchors: Int[Tensor, "s a"]
    """Original indices of the retained tokens, ascending (raster order)."""
    assignment: Int[Tensor, "s n"]
    """Original token -> row of its anchor in ``anchors``; -1 = dropped."""
    weights: Float32[Tensor, "s n"] | None = None
    """Of each token in its cluster's mean, >= 0 and those of anchors > 0; None = equal."""


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
    riders: Float[Tensor, "s a r"] | None = None
    """Riders, merged as the embeddings are."""


class Degenerate(IntEnum):
    """Kinds of bad input that are repaired and counted, never raised (one image of many)."""

    NON_FINITE_EMBEDS = 0
    NON_FINITE_ATTENTION = 1
    NO_ATTENTION = 2
    TOO_FEW_TOKENS = 3
    POLICY_OUTPUT = 4
    """Results of one segment that no policy may return (``steps/validity.py``)."""


DEGENERATE_KINDS: Final = len(Degenerate)
