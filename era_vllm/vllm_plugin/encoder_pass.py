"""Cuts a step's items into passes through the encoder that are no larger than what was profiled.

The scheduler counts K tokens an item and may send more items than vLLM profiled memory for. Leaves
out the encoder, which is vLLM's, and what is done with its rows (``reducer.py``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from era_vllm.contracts import ModelAdapter
from era_vllm.layout import Layout
from era_vllm.types import Signal
from era_vllm.vllm_plugin.fields import Planned


@dataclass(frozen=True, slots=True)
class Encoded:
    """An item behind the encoder."""

    item: Planned
    rows: Tensor
    """[length, d + r]: what vLLM's own encoder gave."""
    signals: Mapping[Signal, Tensor]
    """Of tokens [c, length] or [h, dh, length], of segments [segments]."""


def passes(
    adapter: ModelAdapter, items: Sequence[Planned], inputs: Mapping[str, object], budget: int
) -> Iterator[tuple[Sequence[Planned], dict[str, object]]]:
    """Yield each pass: its items, and their share of the encoder's inputs.

    Args:
        budget: Tokens that the tower may make in a pass; a larger item passes alone.
    """
    layouts = [item.plan.layout for item in items]
    for part in cuts([layout.work for layout in layouts], budget):
        share = {name: _share(adapter, name, x, layouts, part) for name, x in inputs.items()}
        yield items[part], share


def cuts(work: Sequence[int], budget: int) -> list[slice]:
    """Cut items into parts of at most ``budget`` work, at least one item each, in order."""
    parts: list[slice] = []
    first, used = 0, 0
    for index, cost in enumerate(work):
        if index > first and used + cost > budget:
            parts.append(slice(first, index))
            first, used = index, 0
        used += cost
    return [*parts, slice(first, len(work))] if work else []


def encoded(
    items: Sequence[Planned],
    rows: Sequence[Tensor],
    signals: Mapping[Signal, Sequence[Tensor]],
) -> list[Encoded]:
    """Put together what is known of each item of a pass.

    Raises:
        ValueError: another number of rows than the layout says, a fault of the family's adapter.
    """
    for item, own in zip(items, rows, strict=True):
        if len(own) != item.plan.layout.length:
            raise ValueError(
                f"item of shape {item.plan.layout.shape}: the encoder gave {len(own)} rows, its "
                f"layout has {item.plan.layout.length}"
            )
    return [
        Encoded(item, own, {signal: values[index] for signal, values in signals.items()})
        for index, (item, own) in enumerate(zip(items, rows, strict=True))
    ]


def _share(
    adapter: ModelAdapter, name: str, value: object, layouts: Sequence[Layout], part: slice
) -> object:
    """Return some items' share of an encoder input: rows of a tensor, or members of a list."""
    if not isinstance(value, list | tuple) and not (isinstance(value, Tensor) and value.ndim):
        return value
    counts = [adapter.input_rows(layout).get(name, 1) for layout in layouts]
    ends = [0, *accumulate(counts)]
    return value[ends[part.start] : ends[part.stop]]
