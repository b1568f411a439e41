"""How relevant a picture's tokens are to what is asked, by the scout's last layer.

The question's words go through the scout's layers behind prefix and picture, whose keys and values
are there already: what these saw is not changed by what is asked. A token's relevance is the
attention of the words to it in the last layer, mean over heads, largest (or mean) over words. It
is a part of all that a word attends to, so that words that look elsewhere say little.
"""

from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.layout import Layout
from era_vllm.question import Question
from era_vllm.steps.relevance import Reduction, attention_behind, relevance
from era_vllm.vllm_plugin.signals.decoder import Before, Decoder
from era_vllm.vllm_plugin.signals.ranks import mean_over_ranks

_NONE: Final = 0
"""Token id behind a question that is shorter than its neighbours'; nothing sees it."""


def relevance_by_scout(
    decoder: Decoder,
    layouts: Sequence[Layout],
    questions: Sequence[Question],
    pictures: Sequence[Before],
    reduction: Reduction,
) -> Float32[Tensor, "b 1 n"]:
    """Return each token's relevance.

    Args:
        layouts: Of b pictures of one length n.
        questions: Of each; none is empty.
        pictures: What each of the scout's layers made of prefix and picture.
    """
    device = pictures[0].key.device
    count = max(map(len, questions))
    asked = [[*one, *[_NONE] * (count - len(one))] for one in questions]
    hidden = decoder.embedded(torch.tensor(asked).to(device, non_blocking=True).flatten())
    hidden = hidden.to(pictures[0].key.dtype)
    n = len(layouts[0].position_offsets)
    positions = _behind(decoder, layouts, pictures[0].key.shape[2] - n, count).to(
        device, non_blocking=True
    )
    last, residual = len(pictures) - 1, None
    for index, before in enumerate(pictures[:-1]):
        parts, residual = decoder.projected(index, hidden, residual)
        heads = decoder.turned(index, parts, positions, len(layouts)).behind(before)
        hidden, residual = decoder.onwards(index, heads, residual)
    parts, _ = decoder.projected(last, hidden, residual)
    heads = decoder.turned(last, parts, positions, len(layouts))
    key = torch.cat([pictures[last].key, heads.key], 2)
    attention = attention_behind(heads.query, key, decoder.scale(last))
    words = mean_over_ranks(attention[..., -count - n : -count])
    pairs = zip(words, questions, strict=True)
    return torch.stack([relevance(own[: len(question)], reduction) for own, question in pairs])


def _behind(
    decoder: Decoder, layouts: Sequence[Layout], prefix: int, count: int
) -> Int[Tensor, "m"] | Int[Tensor, "p m"]:
    """Return the positions of the words, where text goes on behind a picture."""
    of_words = [
        torch.arange(count)[None].expand(one.position_offsets.shape[1], -1)
        + prefix
        + sum(one.spans)
        for one in layouts
    ]
    found = torch.cat(of_words, -1).clamp(max=decoder.last)
    return found[0] if len(found) == 1 else found
