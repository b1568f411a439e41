"""Prunes pictures of one grid as an engine does: a large one in blocks (``layout.cut``). No vllm.

The engine's way, with items of several sizes at once, is ``vllm_plugin/reducer.py``.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Int
from torch import Tensor

from era_vllm.config import EraConfig
from era_vllm.layout import cut, one_grid
from era_vllm.pipeline import prune
from era_vllm.policies import make_policy
from era_vllm.types import PrunedTokens, Signal, VisualTokens

_GAMMA: Final = 0x9E3779B97F4A7C15 - 2**64
"""splitmix64's, by which a picture's hash is mixed for each block (``signals/pixel_hash.py``)."""


def prune_blocks(tokens: VisualTokens, config: EraConfig, rate: float) -> PrunedTokens:
    """Prune every block of ``config.max_segment`` tokens alone, and put a picture's together.

    Returns:
        Anchors and assignment as of one segment: indices into all of a picture's tokens.
    """
    policy = make_policy(config)
    blocks = cut(one_grid(*tokens.grid, ()), config.max_segment).segments
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, block in enumerate(blocks):
        groups[block.grid].append(index)
    parts: list[tuple[PrunedTokens, Int[Tensor, "b n"]]] = []
    for grid, members in groups.items():
        places = torch.stack([blocks[index].places for index in members]).to(tokens.embeds.device)
        given = tokens if len(blocks) == 1 else _of_blocks(tokens, grid, places, members)
        count = config.num_anchors(given.n, rate)
        parts.append((prune(given, count, policy, merge=config.merge, bias=config.bias), places))
    return parts[0][0] if len(blocks) == 1 else _together(parts, tokens)


def _of_blocks(
    tokens: VisualTokens, grid: tuple[int, int], places: Int[Tensor, "b n"], members: Sequence[int]
) -> VisualTokens:
    """Return the blocks of all pictures as segments, picture by picture."""
    steps = torch.tensor(members, device=places.device) * _GAMMA
    signals = {
        signal: (value[:, None] + steps).flatten()
        if signal is Signal.PIXEL_HASH
        else value[..., places].movedim(-2, 1).flatten(0, 1)
        for signal, value in tokens.signals.items()
    }
    riders = None if tokens.riders is None else tokens.riders[:, places].flatten(0, 1)
    return VisualTokens(tokens.embeds[:, places].flatten(0, 1), grid, signals, riders)


def _together(
    parts: Sequence[tuple[PrunedTokens, Int[Tensor, "b n"]]], tokens: VisualTokens
) -> PrunedTokens:
    pictures, first = tokens.segments, 0
    assignment = torch.full((pictures, tokens.n), -1, device=tokens.embeds.device)
    anchors: list[Tensor] = []
    for pruned, places in parts:
        count = pruned.anchors.shape[1]
        of_picture = places.repeat(pictures, 1)
        anchors.append(of_picture.gather(1, pruned.anchors).view(pictures, -1))
        starts = first + count * torch.arange(len(places), device=places.device).repeat(pictures)
        rows = torch.where(pruned.assignment < 0, -1, pruned.assignment + starts[:, None])
        assignment[:, places.flatten()] = rows.view(pictures, -1)
        first += count * len(places)
    found, order = torch.cat(anchors, 1).sort(1)
    rank = torch.cat([order.argsort(1), torch.full_like(order[:, :1], -1)], 1)

    def in_order(rows: Sequence[Tensor]) -> Tensor:
        whole = torch.cat([one.reshape(pictures, -1, one.shape[-1]) for one in rows], 1)
        return whole.gather(1, order[..., None].expand(-1, -1, whole.shape[-1]))

    every = [pruned for pruned, _ in parts]
    riders = [pruned.riders for pruned in every if pruned.riders is not None]
    return PrunedTokens(
        in_order([pruned.embeds for pruned in every]),
        in_order([pruned.log_bias[..., None] for pruned in every])[..., 0],
        found,
        rank.gather(1, assignment % rank.shape[1]),
        torch.stack([pruned.degenerate for pruned in every]).sum(0),
        in_order(riders) if riders else None,
    )
