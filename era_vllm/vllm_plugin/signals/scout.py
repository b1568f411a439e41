"""The scout: the first layers of the language model, run on each picture alone before it is pruned.

Before the picture stands the prefix (``scout_text.py``); tokens have the positions they have
unpruned (``decoder.py``: how). Under tensor parallelism the heads of queries are gathered, so that
every rank chooses the same anchors. What is asked of a picture may be run behind it, for how
relevant its tokens are (``scout_question.py``). Leaves out who compares by the states
(``VisualTokens.compared``).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from era_vllm.layout import Layout
from era_vllm.question import Question
from era_vllm.steps.relevance import Reduction
from era_vllm.types import Signal
from era_vllm.vllm_plugin.fields import Planned
from era_vllm.vllm_plugin.signals.decoder import Before, Decoder
from era_vllm.vllm_plugin.signals.ranks import all_heads
from era_vllm.vllm_plugin.signals.scout_question import relevance_by_scout


class Scout:
    """Gives states, queries of a later layer, or relevance, for the rows of a pass."""

    def __init__(
        self,
        language_model: nn.Module,
        prefix: Sequence[int],
        *,
        layers: int,
        query_layer: int = 0,
        width: int | None,
        most: int,
        every_layer: bool = False,
        asks: Reduction | None = None,
        suffix: Sequence[int] = (),
    ) -> None:
        """Find the layers.

        Args:
            prefix: Token ids before each picture.
            layers: Layers whose last output is given as states; 0 = none are.
            query_layer: Layer, from 1, whose queries are given; 0 = none are.
            width: Columns of a row that are the token, the others its maps; None = all.
            most: Rows that are run at once, prefix and words included; what is longer runs alone.
            every_layer: Give each layer's output too, for injection.
            asks: Give relevance to what is asked by the last of ``layers``, and so over words.
            suffix: Token ids behind each question.

        Raises:
            UnsupportedError: a language model whose layers are not known here, or fewer of them.
        """
        self._decoder = Decoder(language_model, max(layers, query_layer), width)
        self._states, self._query_layer = layers, query_layer
        self._prefix = torch.tensor(list(prefix), dtype=torch.int64, device="cpu")
        self._suffix = suffix
        self._width, self._most, self._asks = width, most, asks
        given = {
            Signal.SCOUT_STATES: layers > 0,
            Signal.SCOUT_LAYERS: every_layer,
            Signal.LANGUAGE_QUERIES: query_layer > 0,
            Signal.RELEVANCE: asks is not None,
        }
        self.gives = frozenset(signal for signal, wanted in given.items() if wanted)

    def before(self, items: Sequence[Planned]) -> None:
        """Nothing to get ready."""

    def after(
        self, items: Sequence[Planned], rows: Sequence[Tensor]
    ) -> Mapping[Signal, Sequence[Tensor]]:
        """Return float32 [d, length], [hq, dh, length] and [1, length] of each item."""
        found: dict[tuple[Signal, int], Tensor] = {}
        asked = [self._question_of(item) for item in items]
        around = len(self._prefix) + max(map(len, asked), default=0)
        for members in batches([len(own) for own in rows], around, self._most):
            seen = self._run(
                [items[index].plan.layout for index in members],
                [asked[index] for index in members],
                torch.stack([rows[index] for index in members]),
            )
            for signal, values in seen.items():
                for row, index in enumerate(members):
                    found[signal, index] = values[row].movedim(0, -1)
        return {s: [found[s, index] for index in range(len(items))] for s in self.gives}

    def _question_of(self, item: Planned) -> Question:
        """Return an item's question and what follows it; empty = nothing is asked."""
        if self._asks is None or not item.plan.question:
            return ()
        return (*item.plan.question, *self._suffix)

    def _run(
        self,
        layouts: Sequence[Layout],
        questions: Sequence[Question],
        rows: Float[Tensor, "b n c"],
    ) -> dict[Signal, Float32[Tensor, "b n *c"]]:
        """Run the layers on pictures of one length."""
        batch, start, device = len(layouts), len(self._prefix), rows.device
        if self._prefix.device != device:
            self._prefix = self._prefix.to(device, non_blocking=True)
        tokens, *maps = rows.split(self._width or rows.shape[-1], -1)
        before = self._decoder.embedded(self._prefix).to(rows.dtype)
        hidden = torch.cat([before.expand(batch, -1, -1), tokens], 1).flatten(0, 1)
        residual: Tensor | None = None
        places = [_positions(one, start, self._decoder.last, device) for one in layouts]
        positions = torch.cat(places, -1)

        def own(x: Tensor) -> Tensor:
            return x.unflatten(0, (batch, -1))[:, start:]

        seen: dict[Signal, Tensor] = {}
        of_layers: list[Float32[Tensor, "b n d"]] = []
        kept: list[Before] = []
        members = [place for place, question in enumerate(questions) if question]
        asking = torch.tensor(members, dtype=torch.int64).to(device, non_blocking=True)
        for index in range(max(self._states, self._query_layer)):
            parts, residual = self._decoder.projected(index, hidden, residual)
            if index + 1 == self._query_layer:
                # a copy: a rotary embedding may turn them in place
                before_turning = own(parts[0]).to(torch.float32, copy=True)
                seen[Signal.LANGUAGE_QUERIES] = all_heads(before_turning)
                if index >= self._states:
                    break
            heads = self._decoder.turned(index, parts, positions, batch)
            if members and index < self._states:
                kept.append(heads.kept(asking))
            hidden, residual = self._decoder.onwards(index, heads, residual)
            if Signal.SCOUT_LAYERS in self.gives and index < self._states:
                of_layers.append(own(hidden).float() + own(residual).float())
            if index < len(maps):
                own(hidden).add_(maps[index])
            if index + 1 == self._states:
                seen[Signal.SCOUT_STATES] = own(hidden).float() + own(residual).float()
        if of_layers:
            seen[Signal.SCOUT_LAYERS] = torch.cat(of_layers, -1)
        if self._asks is not None:
            found = rows.new_zeros(batch, 1, rows.shape[1], dtype=torch.float32)
            if members:
                own_layouts, own_questions = (
                    [of[at] for at in members] for of in (layouts, questions)
                )
                found[asking] = relevance_by_scout(
                    self._decoder, own_layouts, own_questions, kept, self._asks
                )
            seen[Signal.RELEVANCE] = found.transpose(1, 2)
        return seen


def batches(lengths: Sequence[int], prefix: int, most: int) -> Iterator[list[int]]:
    """Yield indices of items of equal length, of as many as have ``most`` rows or fewer, or one.

    Args:
        prefix: Rows beside each.
    """
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    for length, members in groups.items():
        at_once = max(1, most // (prefix + length))
        for first in range(0, len(members), at_once):
            yield members[first : first + at_once]


@lru_cache(maxsize=256)
def _positions(
    layout: Layout, prefix: int, last: int, device: torch.device
) -> Int[Tensor, "m"] | Int[Tensor, "p m"]:
    """Return the positions of the prefix and of an item's places behind it.

    Of runs one behind another, without the text between them. Past ``last`` (with compact
    positions a picture may be longer than the rotary table) they stay there.
    """
    starts = [0, *accumulate(layout.spans)][:-1]
    of_runs = torch.tensor(starts).repeat_interleave(torch.tensor(layout.run_lengths))
    own = prefix + of_runs[:, None] + layout.position_offsets
    before = torch.arange(prefix)[:, None].expand(-1, own.shape[1])
    found = torch.cat([before, own]).clamp(max=last).T.contiguous()
    found = found.to(device, non_blocking=True)
    return found[0] if len(found) == 1 else found
