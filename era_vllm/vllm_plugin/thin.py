"""Placeholders: K of the N that a family's own processor writes, run by run.

Nothing is written anew, so that no token of any family is named here: what stands around or between
runs (start and end marks, frame texts) stays as it is.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from vllm.multimodal.processing import PromptReplacement
from vllm.multimodal.processing.processor import PromptUpdate, PromptUpdateDetails

from era_vllm.errors import UnsupportedError
from era_vllm.plan import Plan


def thinned(update: PromptUpdate, plans: Sequence[Plan]) -> PromptReplacement:
    """Return a family's replacement of an item's mark with fewer placeholders.

    Args:
        plans: Of the modality's items, in order.

    Raises:
        UnsupportedError: an update that is no replacement.
    """
    if not isinstance(update, PromptReplacement):
        raise UnsupportedError(
            f"{update.modality}: got a prompt update of type {type(update).__name__}, allowed: "
            "PromptReplacement"
        )

    def replacement(index: int) -> PromptUpdateDetails:
        return _thinned(update.resolve(index).content, plans[index])

    return replace(update, replacement=replacement)


def _thinned(content: PromptUpdateDetails, plan: Plan) -> PromptUpdateDetails:
    full = list(content.full)
    mask = [True] * len(full) if content.is_embed is None else content.is_embed(full).tolist()
    kept = keep(mask, plan.layout.run_lengths, plan.kept)
    ids, of_kept = [full[place] for place in kept], torch.tensor([mask[place] for place in kept])
    if content.is_embed is None:
        return PromptUpdateDetails(full=ids)
    return PromptUpdateDetails(full=ids, is_embed=lambda _: of_kept)


def keep(is_embed: Sequence[bool], run_lengths: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Return the places of a replacement that stay: all text, and the first K of each run.

    Args:
        is_embed: Of each token of the replacement, whether it is a placeholder.
        run_lengths: N of each run.
        kept: K of each run.

    Raises:
        ValueError: the placeholders are not these runs, which is a fault of the family's layout.
    """
    places: list[int] = []
    runs = iter(zip(run_lengths, kept, strict=True))
    place = 0
    while place < len(is_embed):
        if not is_embed[place]:
            places.append(place)
            place += 1
            continue
        length, count = next(runs, (0, 0))
        if not length or not all(is_embed[place : place + length]):
            break
        places += range(place, place + count)
        place += length
    if place != len(is_embed) or next(runs, None) is not None:
        raise ValueError(
            f"{sum(is_embed)} placeholders, of which the layout's runs {list(run_lengths)} differ"
        )
    return places
