"""How relevant each visual token is to what is asked of its item.

By attention of the question's words to the item's tokens in the language model's first layer: mean
over heads, and the largest (or the mean) over words; each word and each token alone and without
positions, which needs no pass through any layer. An item of which nothing is asked has 0
everywhere, whatever its neighbours. Where there is a scout, its last layer says it
(``scout_question.py``).
"""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from era_vllm.layout import Layout
from era_vllm.steps.relevance import Reduction, question_attention, relevance
from era_vllm.types import Signal
from era_vllm.vllm_plugin.fields import Planned
from era_vllm.vllm_plugin.signals.first_layer import FirstLayer
from era_vllm.vllm_plugin.signals.ranks import mean_over_ranks


class FirstLayerForm:
    """Attention of the language model's first layer, without its rotary embedding."""

    def __init__(self, language_model: nn.Module) -> None:
        """Find the layer.

        Raises:
            UnsupportedError: a first layer that is another rank's, or makes queries otherwise.
        """
        self._layer = FirstLayer(language_model)

    def attention(
        self, questions: Sequence[Int[Tensor, "t"]], tokens: Sequence[Float[Tensor, "n d"]]
    ) -> list[Float32[Tensor, "t n"]]:
        """Return each question's attention to its item, of all ranks' heads.

        Args:
            questions: Token ids, on the tokens' device; none is empty.
            tokens: Of each question's item; words and tokens are projected at once.
        """
        words = self._layer.words(torch.cat([*questions]))
        queries = self._layer.queries(words).split([len(one) for one in questions])
        keys = self._layer.keys(torch.cat([*tokens])).split([len(one) for one in tokens])
        scale = self._layer.scale
        pairs = zip(queries, keys, strict=True)
        return [mean_over_ranks(question_attention(*pair, scale)) for pair in pairs]


class QuestionRelevance:
    """Gives it for the items of a pass."""

    gives: Final = frozenset({Signal.RELEVANCE})

    def __init__(self, form: FirstLayerForm, reduction: Reduction, width: int | None) -> None:
        """Wrap a layer.

        Args:
            form: Whose attention it is.
            reduction: Over the question's words.
            width: Columns of a row that are the token; None = all.
        """
        self._form, self._reduction, self._width = form, reduction, width

    def before(self, items: Sequence[Planned]) -> None:
        """Nothing to get ready."""

    def after(
        self, items: Sequence[Planned], rows: Sequence[Tensor]
    ) -> Mapping[Signal, Sequence[Tensor]]:
        """Return float32 [1, length] of each item; separators have 0."""
        found = [own.new_zeros(1, len(own), dtype=torch.float32) for own in rows]
        asked = [index for index, item in enumerate(items) if item.plan.question]
        if not asked:
            return {Signal.RELEVANCE: found}
        device = rows[0].device
        questions, places, tokens = list[Tensor](), list[Tensor | slice](), list[Tensor]()
        for index in asked:
            plan, own = items[index].plan, rows[index][:, : self._width]
            questions.append(torch.tensor(plan.question).to(device, non_blocking=True))
            places.append(_places(plan.layout, device))
            tokens.append(own[places[-1]])
        attention = self._form.attention(questions, tokens)
        for index, at, one in zip(asked, places, attention, strict=True):
            found[index][:, at] = relevance(one, self._reduction)
        return {Signal.RELEVANCE: found}


def _places(layout: Layout, device: torch.device) -> Tensor | slice:
    """Return where an item's visual tokens stand among its rows."""
    if not len(layout.outside):
        return slice(None)
    return torch.cat([one.places for one in layout.segments]).to(device, non_blocking=True)
