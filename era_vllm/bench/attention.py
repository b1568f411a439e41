"""``era-vllm bench attention``: the widened attention layer against vLLM's own."""

import statistics
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Final

from era_vllm.bench import plots
from era_vllm.bench.clock import Cell, Samples, interleave
from era_vllm.bench.inputs import image_prompt, noise_pictures, word_prompts
from era_vllm.bench.options import AttentionOptions, facts_of
from era_vllm.bench.report import Goal, Report, engine_table, shown, table, times
from era_vllm.bench.setup import Kind

GOAL: Final = 1.03
KINDS: Final[Mapping[str, tuple[Kind, bool]]] = {
    "era": ("pruned", False),
    "stock": ("bound", False),
    "wide": ("bound", True),
}
"""In the order in which they are started."""
MEASURES: Final = (
    "attention",
    "language_model",
    "ttft",
    "decode_attention",
    "decode_language_model",
    "decode",
)


def run(options: AttentionOptions, out: Path) -> Report:
    """Start the engines, measure, judge and draw."""
    from era_vllm.bench.sides import side_by_side

    mirrored = reversed(KINDS) if options.mirror else ()
    order = [*((name, 0) for name in KINDS), *((name, 1) for name in mirrored)]
    kinds = {f"{name} {copy}": KINDS[name] for name, copy in order}
    with side_by_side(kinds, options) as engines:
        for engine in engines.values():
            engine.watch()
        family = options.asked
        pictures, words = noise_pictures(*family.picture), word_prompts(options.text_tokens)

        def prompt(rate: float | None) -> Mapping[str, object]:
            if rate is None:
                return {"prompt_token_ids": next(words)}
            return image_prompt(next(pictures), rate, mark=family.mark)

        def cell(name: str, rate: float | None) -> Cell:
            copies = cycle([engines[f"{n} {copy}"] for n, copy in order if n == name])
            return lambda: next(copies).ask(prompt(rate), options.decode_tokens)

        cases = {"text": None, **{f"{rate:g}": rate for rate in options.rates}}
        cells = {f"{case} {n}": cell(n, rate) for case, rate in cases.items() for n in KINDS}
        samples = interleave(cells, options.rounds, options.warm_ups)
        held = {name: engines[f"{name} 0"].facts() for name in KINDS}
    ratios = {
        f"{measure} {case} era / {base}": samples.ratio(f"{case} era", f"{case} {base}", measure)
        for case in cases
        for measure in MEASURES
        for base in ("stock", "wide")
    }
    strict = {
        "prefill": strict_ratios(samples, "text"),
        "decode": strict_ratios(samples, "text", "decode_"),
    }
    facts = {**facts_of(options), "engines": held, "ratios": ratios, "strict": strict}
    return _report(samples, facts, list(cases), out)


def strict_ratios(samples: Samples, case: str, prefix: str = "") -> dict[str, float]:
    """Return medians over rounds against stock's step with wide attention layers in it.

    Args:
        prefix: Empty for the prefill step, ``decode_`` for a decode step.

    Returns:
        ``layers``: the same step with era's attention layers in it; ``step``: era's own step.
        Empty where a compiled graph hides the layers.
    """
    whole, layers = f"{prefix}language_model", f"{prefix}attention"
    rows = zip(
        *(samples.of(f"{case} {engine}", whole) for engine in ("era", "stock")),
        *(samples.of(f"{case} {engine}", layers) for engine in KINDS),
        strict=True,
    )
    judged = [
        (step - stock + era, own, step - stock + wide) for own, step, era, stock, wide in rows
    ]
    if not judged:
        return {}
    return {
        "layers": statistics.median(replaced / judge for replaced, _, judge in judged),
        "step": statistics.median(own / judge for _, own, judge in judged),
    }


def _report(samples: Samples, facts: dict[str, object], cases: list[str], out: Path) -> Report:
    measures = [measure for measure in MEASURES if samples.of("text stock", measure)]
    names = [measure.replace("_", " ") for measure in measures]
    bars = [f"{case} {name}" for case in cases for name in KINDS]
    rows = [[cell, *(shown(samples.median(cell, m)) for m in measures)] for cell in bars]
    ratios: Mapping[str, float | None] = facts["ratios"]
    pairs = [f"{case} era / {base}" for case in cases for base in ("stock", "wide")]
    ratio_rows = [[pair, *(times(ratios[f"{m} {pair}"]) for m in measures)] for pair in pairs]
    prefill, decode = (
        ("attention", "decode_attention") if "attention" in measures else ("ttft", "decode")
    )
    plots.bars(
        out / "bench-attention.png",
        f"{facts['model']}, {facts['device']}",
        samples,
        {
            f"{what}, {measure.replace('_', ' ')}": (bars, [measure])
            for what, measure in (("prefill", prefill), ("a decode step", decode))
        },
    )
    strict: Mapping[str, Mapping[str, float]] = facts["strict"]
    return Report(
        samples=samples,
        tables=(
            table(["medians", *names], rows),
            table(["median ratios within a round", *names], ratio_rows),
            engine_table(facts["engines"], base="stock"),
        ),
        goals=[
            Goal(f"text-only {key}, {what} against stock*", found.get(what), "at most", GOAL)
            for key, found in strict.items()
            for what in ("layers", "step")
        ],
        facts=facts,
        notes=(
            f"{facts['model']}; one request at a time",
            "stock* = stock's step with wide's attention layers; wide's own step has wider "
            "projections too",
        ),
    )
