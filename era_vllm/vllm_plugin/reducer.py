"""Prunes what the encoder gave: segments of equal grid and K together, each item in its own order.

Between ``encoder_pass.py`` and vLLM's encoder cache. Leaves out what a policy does (``pipeline``)
and what becomes of the packed rows (``step_state.py``).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from era_vllm.config import EraConfig
from era_vllm.contracts import PruningPolicy
from era_vllm.layout import Layout
from era_vllm.pipeline import prune
from era_vllm.types import DEGENERATE_KINDS, PrunedTokens, VisualTokens
from era_vllm.vllm_plugin.encoder_pass import Encoded
from era_vllm.vllm_plugin.fields import Planned
from era_vllm.vllm_plugin.metrics import ReducerMetrics
from era_vllm.vllm_plugin.packing import pack

_MOST_SIMILARITIES: Final = 2**25
"""Numbers in the n x n matrices of one call of the pipeline, which holds a few of them (128 MiB
each in float32); a larger segment goes alone."""
_MOST_TOKENS: Final = 8192
"""Tokens of one call of the pipeline, or as many as were rehearsed; a larger segment goes alone."""


class PrunedSegment(NamedTuple):
    """One row of a call of the pipeline."""

    tokens: VisualTokens
    result: PrunedTokens
    packed: Tensor
    """[s, a, c]: what stays of the call's segments."""
    row: int


@dataclass(frozen=True, slots=True)
class PrunedItem:
    """What was done with one item, for those who listen."""

    item: Planned
    segments: Sequence[PrunedSegment]
    packed: Tensor
    """[kept, d + r + c]: what goes on to vLLM, in its unpruned order."""


Listener = Callable[[Sequence[PrunedItem]], None]


class Reducer(nn.Module):
    """Encoded items -> rows for vLLM's encoder cache."""

    degenerate: Tensor
    """[kinds] int64: repaired inputs so far, in the order of ``types.Degenerate``."""

    def __init__(self, policy: PruningPolicy, era: EraConfig, width: int | None) -> None:
        """Make a reducer.

        Args:
            width: Columns of a row that are the token; None = all.
        """
        super().__init__()
        self._policy, self._era, self._width = policy, era, width
        self.metrics = ReducerMetrics()
        self.listeners: list[Listener] = []
        self._most_tokens = _MOST_TOKENS
        counts = torch.zeros(DEGENERATE_KINDS, dtype=torch.int64)
        self.register_buffer("degenerate", counts, persistent=False)

    def forward(self, items: Sequence[Encoded]) -> list[Tensor]:
        """Return for each item [kept, d + r + c]: what stays, in its unpruned order, packed."""
        found: dict[tuple[int, int], PrunedSegment] = {}
        with self.metrics.timed(len(items), self.degenerate):
            for num_anchors, members in _groups(items, self._most_tokens):
                tokens = self._stacked(items, members)
                result = self._prune(tokens, num_anchors)
                self.degenerate += result.degenerate
                packed = _packed(items, members, result)
                for row, member in enumerate(members):
                    found[member] = PrunedSegment(tokens, result, packed, row)
            pruned = list[PrunedItem]()
            for i, item in enumerate(items):
                own = [found[i, j] for j in range(len(item.item.plan.num_anchors))]
                pruned.append(PrunedItem(item.item, own, _assembled(item, own)))
        for listener in tuple(self.listeners):
            listener(pruned)
        return [one.packed for one in pruned]

    def rehearse(self, items: Sequence[Encoded]) -> None:
        """Run the pipeline at its largest, the largest grids at K = n - 1, and drop the result.

        In the pass that vLLM profiles memory with K may be n, for which there is nothing to do. No
        later call has more tokens.
        """
        _, members = next(_groups(items, None))
        tokens = self._stacked(items, members)
        self._most_tokens = max(_MOST_TOKENS, tokens.segments * tokens.n)
        if tokens.n > 1:
            self._prune(tokens, tokens.n - 1)

    def _prune(self, tokens: VisualTokens, num_anchors: int) -> PrunedTokens:
        era = self._era
        return prune(tokens, num_anchors, self._policy, merge=era.merge, bias=era.bias)

    def _stacked(self, items: Sequence[Encoded], members: "Members") -> VisualTokens:
        device = items[0].rows.device
        index = [_on(items[item].item.plan.layout, device).places[j] for item, j in members]
        rows = torch.stack([items[i].rows[at] for (i, _), at in zip(members, index, strict=True)])
        embeds, riders = rows, None
        if self._width is not None:
            embeds, riders = rows[..., : self._width], rows[..., self._width :]
        first, segment = members[0]
        signals = {
            signal: torch.stack(
                [
                    _of_segment(items[i].signals[signal], j, at)
                    for (i, j), at in zip(members, index, strict=True)
                ]
            ).to(device, non_blocking=True)
            for signal in items[first].signals
        }
        grid = items[first].item.plan.layout.segments[segment].grid
        return VisualTokens(embeds, grid, signals, riders)


Members = list[tuple[int, int]]
"""(item, segment), both by index."""


class _OnDevice(NamedTuple):
    places: list[Int[Tensor, "n"]]
    separators: Int[Tensor, "k"]
    outside: Int[Tensor, "k"]
    offsets: Int[Tensor, "length p"]


@lru_cache(maxsize=256)
def _on(layout: Layout, device: torch.device) -> _OnDevice:
    """Return a layout's indices on a device; layouts are cached, so this is once a size."""

    def to(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    places = [to(segment.places) for segment in layout.segments]
    outside = to(layout.outside)
    return _OnDevice(places, to(layout.separators), outside, to(layout.position_offsets))


def _groups(items: Sequence[Encoded], most_tokens: int | None) -> Iterator[tuple[int, Members]]:
    """Yield K and the segments that go through the pipeline together, the largest grids first."""
    groups: dict[tuple[tuple[int, int], int], Members] = defaultdict(list)
    for i, item in enumerate(items):
        plan = item.item.plan
        pairs = zip(plan.layout.segments, plan.num_anchors, strict=True)
        for j, (segment, count) in enumerate(pairs):
            groups[segment.grid, count].append((i, j))
    largest = sorted(groups.items(), key=lambda group: -group[0][0][0] * group[0][0][1])
    for (grid, count), members in largest:
        n = grid[0] * grid[1]
        at_once = max(1, _MOST_SIMILARITIES // (n * n))
        if most_tokens is not None:
            at_once = max(1, min(at_once, most_tokens // n))
        for first in range(0, len(members), at_once):
            yield count, members[first : first + at_once]


def _of_segment(value: Tensor, segment: int, places: Int[Tensor, "n"]) -> Tensor:
    """Return a segment's share of an item's signal: of its tokens, or its own number."""
    return value[..., places] if value.is_floating_point() else value[segment]


def _packed(items: Sequence[Encoded], members: Members, result: PrunedTokens) -> Tensor:
    """Return [s, a, c]: what stays of some segments, packed."""
    device = result.anchors.device
    offsets = []
    for i, j in members:
        known = _on(items[i].item.plan.layout, device)
        offsets.append(known.offsets[known.places[j]])
    of_tokens = torch.stack(offsets)
    index = result.anchors[..., None].expand(-1, -1, of_tokens.shape[-1])
    rows = result.embeds
    if result.riders is not None:
        rows = torch.cat([rows, result.riders], -1)
    return pack(rows, result.log_bias, of_tokens.gather(1, index))


def _assembled(item: Encoded, pruned: Sequence[PrunedSegment]) -> Tensor:
    """Return an item's packed rows in their unpruned order. No host synchronisation."""
    layout, device = item.item.plan.layout, item.rows.device
    separators = item.item.plan.separators
    if len(pruned) == 1 and not len(separators):
        (only,) = pruned
        return only.packed[only.row]
    known = _on(layout, device)
    rows = [segment.packed[segment.row] for segment in pruned]
    places = [
        own[segment.result.anchors[segment.row]]
        for own, segment in zip(known.places, pruned, strict=True)
    ]
    if len(separators):
        at = known.separators if separators is layout.separators else known.outside
        kept = item.rows[at]
        no_bias = torch.zeros(len(at), dtype=torch.float32, device=device)
        rows.append(pack(kept, no_bias, known.offsets[at]))
        places.append(at)
    return torch.cat(rows)[torch.cat(places).argsort()]
