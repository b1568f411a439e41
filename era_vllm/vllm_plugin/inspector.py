"""Keeps what a worker pruned for somebody who watches for one item (``/v1/era/inspect``).

One of the reducer's listeners while somebody watches, and none otherwise. An item is known by the
hash of its pixels, K of its segments and what is asked of it: the model sees no request ids. So a
neighbour with the same picture at the same rate may be caught in its place, and is the same thing.
Bounded in number and time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Final, NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor

from era_vllm.contracts import PruningPolicy
from era_vllm.layout import SegmentLayout
from era_vllm.policies import era
from era_vllm.question import Question
from era_vllm.steps.entropy import head_entropy, head_profile, unattended
from era_vllm.types import Signal, VisualTokens
from era_vllm.vllm_plugin.reducer import Listener, PrunedItem, PrunedSegment

_MOST: Final = 8
"""Items watched for at once: one an API server is usual."""


class Watched(NamedTuple):
    """Names an item."""

    pixel_hash: int
    num_anchors: tuple[int, ...]
    """K of each segment."""
    question: Question = ()
    """``Plan.question``."""


@dataclass(frozen=True, slots=True)
class FoundSegment:
    """What was pruned of one segment, in plain values."""

    unit: int
    """Tile or frame."""
    units: int
    """Frames from that one on, one above another."""
    box: tuple[float, float, float, float]
    """Top, left, bottom, right of what it shows of them, in shares of their height and width."""
    grid: tuple[int, int]
    anchors: list[int]
    assignment: list[int]
    log_bias: list[float]
    entropy: list[float] | None
    """Head entropy of each visual token, [0, 1]; None where the policy reads no attention."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was pruned of one item."""

    segments: list[FoundSegment]
    length: int
    """Of the item unpruned."""
    units: int
    separators: int
    """Tokens that are kept as they are: newlines."""
    log_bias: list[float]
    """Of the item's slots, in the order of the prompt."""


class Inspector:
    """Catches watched images while they are pruned."""

    def __init__(
        self,
        policy: PruningPolicy,
        listeners: list[Listener],
    ) -> None:
        """Keep out of the list until the first watch.

        Args:
            listeners: The reducer's, which this joins while it watches.
        """
        self._policy = policy
        self._listeners = listeners
        self._until: dict[Watched, float] = {}
        self._found: dict[Watched, Found] = {}

    def watch(self, item: Watched, seconds: float) -> None:
        """Catch an item that is pruned within so many seconds; forgets the oldest of too many."""
        self._drop_late()
        self._until[item] = monotonic() + seconds
        while len(self._until) > _MOST:
            self._forget(next(iter(self._until)))
        if self not in self._listeners:
            self._listeners.append(self)

    def take(self, item: Watched) -> Found | None:
        """Return what was caught, and forget it; None = it was not pruned since."""
        found = self._found.get(item)
        self._forget(item)
        return found

    def __call__(self, items: Sequence[PrunedItem]) -> None:
        """Look at one pass of the reducer; waits for the device."""
        self._drop_late()
        for one in items if self._until else ():
            plan = one.item.plan
            watched = Watched(one.item.pixel_hash, plan.num_anchors, plan.question)
            if watched in self._until:
                pairs = zip(plan.layout.segments, one.segments, strict=True)
                self._found[watched] = Found(
                    [self._segment(*pair) for pair in pairs],
                    plan.layout.length,
                    plan.layout.units,
                    len(plan.separators),
                    _of_slots(one).tolist(),
                )

    def _segment(self, layout: SegmentLayout, segment: PrunedSegment) -> FoundSegment:
        tokens, result, row = segment.tokens, segment.result, segment.row
        entropy = token_entropy(self._policy, tokens)
        return FoundSegment(
            layout.unit,
            layout.units,
            layout.box,
            tokens.grid,
            result.anchors[row].tolist(),
            result.assignment[row].tolist(),
            result.log_bias[row].tolist(),
            None if entropy is None else entropy[row].nan_to_num(1.0).tolist(),
        )

    def _drop_late(self) -> None:
        now = monotonic()
        for image in [image for image, until in self._until.items() if until < now]:
            self._forget(image)

    def _forget(self, item: Watched) -> None:
        self._until.pop(item, None)
        self._found.pop(item, None)
        if not self._until and self in self._listeners:
            self._listeners.remove(self)


def _of_slots(one: PrunedItem) -> Float32[Tensor, "k"]:
    """Return the log-bias of an item's tokens in the order of the prompt; separators have none."""
    layout, separators = one.item.plan.layout, one.item.plan.separators
    pairs = list(zip(layout.segments, one.segments, strict=True))
    bias = [of.result.log_bias[of.row].cpu() for _, of in pairs]
    places = [segment.places[of.result.anchors[of.row].cpu()] for segment, of in pairs]
    bias.append(torch.zeros(len(separators)))
    return torch.cat(bias)[torch.cat([*places, separators]).argsort()]


def token_entropy(policy: PruningPolicy, tokens: VisualTokens) -> Float32[Tensor, "s n"] | None:
    """Return each token's head entropy as the policy sees it; None where it reads none."""
    if not isinstance(policy, era.Policy) or Signal.ENCODER_ATTENTION not in tokens.signals:
        return None
    profile = head_profile(tokens, policy.saliency, policy.temperature)
    return head_entropy(profile, unattended(tokens, policy.mass_guard))
