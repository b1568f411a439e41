"""What blocks and a sample of queries change: on photos, and in the sample model's answers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Final

import torch
from jaxtyping import Float32, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from era_vllm.bench.block_cost import cases, named
from era_vllm.bench.options import SegmentsOptions
from era_vllm.bench.photo_tokens import PhotoTokens, photo_tokens
from era_vllm.config import EraConfig
from era_vllm.lab.asking import TransformersAsker, ask
from era_vllm.lab.blocks import prune_blocks
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.scores import Counts, Estimate, Score, count, difference_of_all
from era_vllm.lab.screen import bar
from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.dataset import generate
from era_vllm.lab.synth.questions import LEARNED_FAMILIES
from era_vllm.policies import defaults
from era_vllm.steps.received_attention import MOST_QUERIES, received_attention
from era_vllm.types import PrunedTokens, Signal, VisualTokens

_PARTS: Final = (8, 4, 2, 1)
"""Of the sample model's tokens: a block's share."""
Facts = dict[str, float]


def on_photos(
    oracle: Oracle, options: SegmentsOptions
) -> tuple[dict[str, Facts], dict[str, Facts]]:
    """Return means over photos: of each case of blocks, and of each way to take queries."""
    photos = {**load_material(split="test").photos, **load_material(split="train").photos}
    photos = dict(islice(photos.items(), options.photos))
    blocks, sampling = dict[str, list[Facts]](), dict[str, list[Facts]]()
    work = len(photos) * (len(list(cases(options, options.tokens))) + len(options.tokens))
    with bar(work, "photos", "step") as shown_bar:
        for photo in photos.values():
            for n in options.tokens:
                known = photo_tokens(oracle, photo, round(n**0.5))
                wholes = {}
                for case in reversed(list(cases(options, [n]))):
                    _, most, policy = case
                    config = defaults(policy, max_segment=most)
                    with torch.inference_mode():
                        pruned = prune_blocks(known.tokens, config, options.rate)
                    wholes.setdefault(policy, pruned.anchors)
                    found = merge_error(known.tokens, pruned)
                    found["shared_with_whole"] = shared(pruned.anchors, wholes[policy])
                    blocks.setdefault(named(case), []).append(found)
                    shown_bar.update()
                whole = of_all_queries(known)
                step = max(1, n // MOST_QUERIES)
                readings = {
                    f"{n} patches, one of each stretch": known.query,
                    f"{n} patches, each {step}th": known.query[:, ::step],
                }
                for name, query in readings.items():
                    read = received_attention(query, known.key, known.scale)
                    error = sample_error(known, read, whole, EraConfig(), options.rate)
                    sampling.setdefault(name, []).append(error)
                shown_bar.update()
    return _means(blocks), _means(sampling)


def _means(found: Mapping[str, Sequence[Facts]]) -> dict[str, Facts]:
    return {
        name: {key: sum(one[key] for one in of) / len(of) for key in of[0]}
        for name, of in found.items()
    }


def answers(oracle: Oracle, options: SegmentsOptions) -> dict[str, tuple[Score, Estimate]]:
    """Ask the sample model with its picture in 8, 4, 2 blocks and whole.

    Returns: right answers, and how many more of all they are than with the picture whole.
    """
    pictures = list(generate(options.pictures, 777, None, LEARNED_FAMILIES, 4))
    n, found = oracle.model.config.image_seq_length, dict[str, tuple[Score, Estimate]]()
    with _one_thread():
        for policy in options.policies:
            counts: dict[int, Counts] = {}
            for part in _PARTS:
                config = defaults(policy, max_segment=n // part)
                given = ask(TransformersAsker(oracle, config), pictures, options.answer_rate)
                counts[part] = count(pictures, given)
            for part, ours in counts.items():
                gain = difference_of_all(ours, counts[1])
                found[f"{policy} {n // part} of {n}"] = ours.total, gain
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products as small as the sample model's are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def merge_error(tokens: VisualTokens, pruned: PrunedTokens) -> Facts:
    """Compare every token with the merged row of its anchor.

    Returns: ``relative_mse`` is the sum of squared differences, over the sum of squares.
    """
    index = pruned.assignment[..., None].expand_as(tokens.embeds)
    merged, embeds = pruned.embeds.float().gather(1, index), tokens.embeds.float()
    cosine = cosine_similarity(embeds, merged, -1).mean()
    squares = (embeds - merged).square().sum() / embeds.square().sum()
    kept = pruned.anchors.shape[1]
    return {"one_minus_cos": 1 - float(cosine), "relative_mse": float(squares), "kept": kept}


def shared(ours: Int[Tensor, "1 a"], theirs: Int[Tensor, "1 b"]) -> float:
    """Return the share of ``ours`` that is among ``theirs``."""
    return float(torch.isin(ours, theirs).float().mean())


def of_all_queries(photo: PhotoTokens) -> Float32[Tensor, "1 hv n"]:
    """Return what each key receives of every query, read in stretches that are not sampled."""
    total = torch.zeros(photo.key.shape[2], photo.key.shape[1])
    n = photo.query.shape[1]
    for part in photo.query.split(MOST_QUERIES, 1):
        share = part.shape[1] / n
        total += received_attention(part, photo.key, photo.scale)[0] * share
    return total[None]


def sample_error(
    photo: PhotoTokens,
    found: Float32[Tensor, "1 hv n"],
    whole: Float32[Tensor, "1 hv n"],
    config: EraConfig,
    rate: float,
) -> Facts:
    """Compare one reading with that of all queries, and the anchors that follow from both.

    Returns:
        ``mean_relative``, |difference| / mean over keys, then over heads; ``bias``, the same with
        the sign: 0 on average, however large the error; ``largest_relative``, of a key, in its
        head's mean; ``anchors_shared``.
    """
    error = (found - whole) / whole.mean(-1, keepdim=True)
    own, theirs = (
        prune_blocks(replace(photo.tokens, signals={Signal.ENCODER_ATTENTION: read}), config, rate)
        for read in (found, whole)
    )
    return {
        "mean_relative": float(error.abs().mean()),
        "bias": float(((found - whole) / whole).mean()),
        "largest_relative": float(error.abs().max()),
        "anchors_shared": shared(own.anchors, theirs.anchors),
    }
