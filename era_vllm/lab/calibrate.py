"""Fit the bias: how much of it each layer takes (gamma), and how much there is (mass_scale of era).

The bias that restores attention in one layer is too little in the next: anchors are the tokens that
early layers look at, and late layers look elsewhere. With b_s the bias of an anchor, a layer's
odds of attending to a picture grow by about exp(gamma E[b]), E by attention. So from one pass
unpruned and one pruned, over the text behind the pictures:

    gamma <- gamma + sum w m (ln odds unpruned - ln odds pruned) / sum w m^2,   m = E[b]

with w = a (1 - a), a the unpruned attention to the picture: where nearly all or nothing is on it,
a change of odds changes nothing. Closed form, no labels, no gradients; a second pass measures with
the first one's gamma, as a layer sees what the layers before it did.

One number for all layers is rho of ``era``, with b = 1 + rho W of an anchor: the same step with m =
E[W / (1 + rho W)], what the odds' logarithm gains by rho, over all layers at once.

Source: docs/method.md, ideas beyond the paper; the paper has gamma = 1 in all layers. Leaves out
the file (``calibration.py``) and the command (``cli/calibrate.py``).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from era_vllm.config import EraConfig, Gamma
from era_vllm.lab.asking import chat_ids
from era_vllm.lab.blocks import prune_blocks
from era_vllm.lab.oracle import LanguageOracle, Oracle, Segment, segments_of
from era_vllm.question import Question, of_text, special_ids

if TYPE_CHECKING:
    from PIL.Image import Image

Positions = Literal["original", "compact"]

PASSES: Final = 2
MASS_PASSES: Final = 4
MOST: Final = 4.0
"""Largest gamma."""
_MOST_FACTOR: Final = 50.0
"""Of rho, against that which was pruned with."""
_TINY: Final = 1e-6
Progress = Callable[[], object]
"""Called after each case of each pass."""


@dataclass(frozen=True, slots=True)
class Case:
    """One question about pictures, unpruned and pruned: text ids are the same behind them."""

    whole_ids: Sequence[int]
    whole: Sequence[Segment]
    pruned_ids: Sequence[int]
    pruned: Sequence[Segment]
    picture: int = 0
    """Questions about one picture are not independent."""


def cases_of(
    oracle: Oracle,
    config: EraConfig,
    rates: Sequence[float],
    picture: "tuple[int, Image, Sequence[str]]",
) -> list[Case]:
    """Return a case for each question about a picture, at one of the rates in turn.

    Args:
        rates: Which is first changes with every second picture, as every second one is kept back.
        picture: Its number, itself, and questions.
    """
    number, image, questions = picture
    tokenizer = oracle.processor.tokenizer
    special, of_question = special_ids(tokenizer), dict[Question, list[list[Segment]]]()
    found: list[Case] = []
    for index, question in enumerate(questions, number // 2):
        asked = of_text(question, tokenizer, special) if config.question_aware else ()
        if asked not in of_question:
            tokens = oracle.tokens([image], config, [asked])
            of_question[asked] = [
                segments_of(prune_blocks(tokens, config, rate)) for rate in (0.0, *rates)
            ]
        whole, *pruned = of_question[asked]
        kept = pruned[index % len(pruned)]
        ids = [chat_ids(oracle, question, each) for each in (whole, kept)]
        found.append(Case(ids[0], whole, ids[1], kept, number))
    return found


@dataclass(frozen=True, slots=True)
class Seen:
    """What rows of text do, [layers, query heads, rows] each."""

    odds: Float[Tensor, "l h r"]
    """Logarithm of the odds of attending to a picture."""
    share: Float[Tensor, "l h r"]
    mean: Float[Tensor, "l h r"]
    """Of ``attend``'s values, over what is attended to in pictures; the log-bias unless others are
    given."""
    log_probs: Float[Tensor, "v"]
    """Behind the last row."""


def attend(
    oracle: LanguageOracle,
    ids: Sequence[int],
    segments: Sequence[Segment],
    *,
    bias: bool,
    gamma: Gamma = None,
    positions: Positions = "original",
    values: Sequence[Float[Tensor, "a"]] | None = None,
) -> Seen:
    """Run the language model over a prompt, and read what text behind its pictures attends to.

    Args:    values: Of each segment's tokens, to be averaged; None = their log-bias.
    """
    visual: Bool[Tensor, t] = oracle.is_visual(torch.tensor([list(ids)]), 1)[0]
    first = int(visual.nonzero().max()) + 1
    of_slot = torch.cat(values or [segment.log_bias for segment in segments]).float()
    found: list[tuple[Tensor, Tensor]] = []

    def keep(_: object, __: object, given: tuple[Tensor, Tensor]) -> None:
        on_pictures = given[1][0, :, first:].float()[..., visual]
        share = on_pictures.sum(-1)
        found.append((share, (on_pictures @ of_slot) / share.clamp_min(_TINY)))

    with ExitStack() as stack:
        for layer in oracle.model.model.language_model.layers:
            stack.callback(layer.self_attn.register_forward_hook(keep).remove)
        last = oracle.log_probs(ids, segments, 1, bias=bias, gamma=gamma, positions=positions)[0]
    share = torch.stack([of_layer for of_layer, _ in found]).clamp(_TINY, 1 - _TINY)
    return Seen(share.logit(), share, torch.stack([mean for _, mean in found]), last)


def fit(
    oracle: LanguageOracle,
    cases: Sequence[Case],
    *,
    positions: Positions = "original",
    per_head: bool = False,
    step: Progress,
) -> list[list[float]]:
    """Return gamma, [layers][KV heads], or [layers][1] where heads share it.

    Args:
        oracle: With eager attention.
        cases: A few dozen.
        positions: Of ``EraConfig``.
        per_head: Whether each KV head has its own.
    """
    text = oracle.model.config.get_text_config()
    layers, heads = text.num_hidden_layers, text.num_key_value_heads if per_head else 1
    gamma = torch.ones(layers, heads)
    wholes: list[Seen] = []
    for number in range(PASSES):
        sums = torch.zeros(2, layers, heads)
        for index, case in enumerate(cases):
            if not number:
                wholes.append(attend(oracle, case.whole_ids, case.whole, bias=False))
            now = as_setting(gamma.tolist())
            pruned = attend(
                oracle, case.pruned_ids, case.pruned, bias=True, gamma=now, positions=positions
            )
            sums += _sums(wholes[index], pruned, heads)
            step()
        gamma = (gamma + sums[0] / sums[1].clamp_min(_TINY)).clamp(0.0, MOST)
    return [[round(value, 4) for value in row] for row in gamma.tolist()]


def rescaled(segments: Sequence[Segment], factor: float) -> list[Segment]:
    """Return segments whose b = 1 + rho W has so many times the rho."""
    return [
        replace(one, log_bias=(factor * one.log_bias.float().expm1()).log1p()) for one in segments
    ]


def fit_mass(
    oracle: LanguageOracle,
    cases: Sequence[Case],
    *,
    positions: Positions = "original",
    step: Progress,
) -> float:
    """Return how many times the rho that cases were pruned with restores the odds, on the whole."""
    factor, wholes = 1.0, list[Seen]()
    for number in range(MASS_PASSES):
        sums = torch.zeros(2)
        for index, case in enumerate(cases):
            if not number:
                wholes.append(attend(oracle, case.whole_ids, case.whole, bias=False))
            now = rescaled(case.pruned, factor)
            gain = [-torch.expm1(-one.log_bias) / factor for one in now]
            pruned = attend(
                oracle, case.pruned_ids, now, bias=True, positions=positions, values=gain
            )
            sums += _sums(wholes[index], pruned, 1).sum((1, 2))
            step()
        factor += float(sums[0] / sums[1].clamp_min(_TINY))
        factor = min(max(factor, _TINY), _MOST_FACTOR)
    return factor


def _sums(whole: Seen, pruned: Seen, heads: int) -> Float[Tensor, "2 l h"]:
    weight = whole.share * (1 - whole.share)
    missing = whole.odds - pruned.odds
    parts = torch.stack([weight * pruned.mean * missing, weight * pruned.mean.square()])
    return parts.unflatten(2, (heads, -1)).sum((3, 4))


def as_setting(rows: Sequence[Sequence[float]]) -> Gamma:
    """Return gamma as ``EraConfig`` takes it."""
    if all(len(row) == 1 for row in rows):
        return tuple(row[0] for row in rows)
    return tuple(map(tuple, rows))


@dataclass(frozen=True, slots=True)
class Check:
    """How far pruned attention and answers are from unpruned ones, on other pictures."""

    odds: Float[Tensor, "s l"]
    """By setting and layer: mean of ln(odds unpruned / odds pruned), weighted as in the fit."""
    kl: Float[Tensor, "s p"]
    """By setting and picture: KL of the next token, unpruned against pruned, in nats."""
    agree: Float[Tensor, "s p"]
    """How often the likeliest next token is the same."""

    @property
    def gain(self) -> tuple[float, float]:
        """Return the KL that the last setting saves beside the bias as it is, and 1.96 errors."""
        saved = self.kl[1] - self.kl[-1]
        return float(saved.mean()), float(1.96 * saved.std() / len(saved) ** 0.5)


def check(
    oracle: LanguageOracle,
    cases: Sequence[Case],
    settings: Sequence[tuple[bool, Gamma, float]],
    *,
    positions: Positions = "original",
    step: Progress,
) -> Check:
    """Measure settings against unpruned.

    Args:    settings: bias, gamma, and how many times the rho; of ``Check`` the second is the bias
        as it is.
    """
    odds: list[list[Tensor]] = [[] for _ in settings]
    kl: list[list[Tensor]] = [[] for _ in settings]
    agree: list[list[Any]] = [[] for _ in settings]
    for case in cases:
        whole = attend(oracle, case.whole_ids, case.whole, bias=False)
        weight = whole.share * (1 - whole.share)
        for index, (bias, gamma, factor) in enumerate(settings):
            ids = case.pruned_ids
            segments = case.pruned if factor == 1 else rescaled(case.pruned, factor)
            seen = attend(oracle, ids, segments, bias=bias, gamma=gamma, positions=positions)
            missing = (weight * (whole.odds - seen.odds)).sum((1, 2)) / weight.sum((1, 2))
            odds[index].append(missing)
            ratio = whole.log_probs - seen.log_probs
            kl[index].append((whole.log_probs.exp() * ratio).sum())
            agree[index].append(whole.log_probs.argmax() == seen.log_probs.argmax())
        step()
    numbers = torch.tensor([case.picture for case in cases])
    of_picture = torch.stack([(numbers == number).float() for number in numbers.unique()])
    of_picture = of_picture / of_picture.sum(1, keepdim=True)
    return Check(
        torch.stack([torch.stack(rows).mean(0) for rows in odds]),
        torch.stack([torch.stack(rows) for rows in kl]) @ of_picture.T,
        torch.tensor(agree, dtype=torch.float32) @ of_picture.T,
    )
