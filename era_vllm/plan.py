"""What will be done with an item: its layout and K of each segment, known before it is encoded.

Made once a request, from the item's sizes and its rate alone; everything behind it (placeholders,
identity, reducer, reports) reads the plan. Leaves out: where rates come from (``vllm_plugin``).
"""

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Int
from torch import Tensor

from era_vllm.config import EraConfig
from era_vllm.layout import Layout
from era_vllm.question import Question


@dataclass(frozen=True, eq=False)
class Plan:
    """One item's."""

    layout: Layout
    num_anchors: tuple[int, ...]
    """K of each segment, in [1, n]."""
    question: Question = ()
    """What is asked of it (``EraConfig.question_aware``); empty = nothing."""

    @property
    def whole(self) -> bool:
        """Whether nothing is pruned."""
        return sum(self.num_anchors) == sum(segment.n for segment in self.layout.segments)

    @cached_property
    def separators(self) -> Int[Tensor, "k"]:
        """Places that stay as they are: the layout's separators.

        Where nothing is pruned nothing is dropped either, so that such an item is stock's.
        """
        return self.layout.outside if self.whole else self.layout.separators

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Tokens that stay of each run, separators included."""
        kept = self.layout.by_run(self.separators)
        for run, count in zip(self.layout.run_of_segment, self.num_anchors, strict=True):
            kept[run] += count
        return tuple(kept)


def plan(layout: Layout, pruning_rate: float, config: EraConfig) -> Plan:
    """Return the plan of an item: K of each segment follows from its own n and the rate."""
    counts = tuple(config.num_anchors(segment.n, pruning_rate) for segment in layout.segments)
    return Plan(layout, counts)
