"""``era-vllm bench attention``: the widened attention layer against vLLM's own."""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Final

from era_vllm.cli.bench_setup import (
    add_common_options,
    add_engine_options,
    check_rates,
    device,
    engine_options,
    engine_settings,
    named,
    set_environment,
)
from era_vllm.cli.options import add_era_options, era_settings
from era_vllm.cli.quiet import muted, progress
from era_vllm.lab.dummy import IMAGE_SIZE, SIZES, make_dummy_llava

if TYPE_CHECKING:
    from era_vllm.lab.bench.clock import Cell, Samples
    from era_vllm.lab.bench.report import Goal, Report

DESCRIPTION: Final = """Time the attention layer that carries the bias against vLLM's own.

  era-vllm bench attention                              text, and pictures at .5 and .889
  era-vllm bench attention --rates .889 --rounds 3      a quick look

Real engines with dummy weights stay alive in this process and are asked in turn, with the same KV
cache memory: stock layers; stock layers of a model whose heads are as wide as the widened ones
(wide); and the rectified layers (era). All get the same prompts: text only, and pictures of which
the language model is fed K tokens (the stock ones keep the first K projector rows).

Where weights happen to lie in memory changes a decode step by up to 5 %: of two identical engines
the one started first is often the slower. So each kind is started twice, in mirrored order (era,
stock, wide, wide, stock, era), and the two take turns (`--no-mirror`: once, half the memory).

Timed inside, by hooks: all attention layers of one prefill and of one decode step (cache write
included), and the language model's whole step around them. The model of `wide` has wider
projections too, so the strict comparison is

  stock*   stock's step, with its attention layers' time replaced by wide's

and the goal is that a text-only step is at most 3 % slower: stock's step with era's attention
layers in it (`layers`), and era's own step (`step`, as noisy as the rest of the model is).
`--no-eager` hides the layers in a compiled graph: then only TTFT and decode time are compared. Also
shown: the KV blocks that the same memory holds. Writes OUT/bench-attention.json and .png.
"""
RATES: Final = (0.5, 0.889)
GOAL: Final = 1.03
ENGINES: Final = ("era", "stock", "wide")
"""In the order in which they are started."""
MEASURES: Final = (
    "attention",
    "language_model",
    "ttft",
    "decode_attention",
    "decode_language_model",
    "decode",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    add_common_options(parser, rounds=8)
    add_engine_options(parser, rates=RATES, eager=True)
    parser.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start each engine twice, in mirrored order (default: %(default)s)",
    )
    add_era_options(parser)


def settings(arguments: argparse.Namespace) -> Mapping[str, object]:
    """Return the options as they were used."""
    return {**engine_settings(arguments), "mirror": arguments.mirror}


def run(arguments: argparse.Namespace) -> "Report":
    """Start the engines, measure, judge and draw."""
    check_rates(arguments.rates, era_settings(arguments))
    size, options = SIZES[arguments.shape], engine_options(arguments)
    set_environment(eager=options.eager)
    progress("importing vLLM")
    with muted():
        from era_vllm.cli import bench_engines as start
    from era_vllm.lab.bench.clock import interleave
    from era_vllm.lab.bench.inputs import image_prompt, noise_pictures, word_prompts

    order = [(name, 0) for name in ENGINES] + [
        (name, 1) for name in reversed(ENGINES) if arguments.mirror
    ]
    progress(f"starting {len(order)} engines: {named(size)}")
    with tempfile.TemporaryDirectory() as folder, start.running() as engines:
        narrow, wide = Path(folder) / "narrow", Path(folder) / "wide"
        make_dummy_llava(narrow, size)
        for name, copy in order:
            with muted():
                if name == "era":
                    engine = start.pruned(narrow, options, era_settings(arguments))
                else:
                    engine = start.bound(wide if name == "wide" else narrow, options)
            engines[f"{name} {copy}"] = engine
            engine.watch()
            if not wide.exists():
                make_dummy_llava(wide, replace(size, head_size=engine.head_size))
        pictures, words = noise_pictures(IMAGE_SIZE), word_prompts(arguments.text_tokens)

        def prompt(rate: float | None) -> Mapping[str, object]:
            if rate is None:
                return {"prompt_token_ids": next(words)}
            return image_prompt(next(pictures), rate)

        def cell(name: str, rate: float | None) -> "Cell":
            copies = cycle([engines[f"{n} {copy}"] for n, copy in order if n == name])
            return lambda: next(copies).ask(prompt(rate), arguments.decode_tokens)

        cases = {"text": None, **{f"{rate:g}": rate for rate in arguments.rates}}
        cells = {f"{case} {n}": cell(n, rate) for case, rate in cases.items() for n in ENGINES}
        samples = interleave(cells, arguments.rounds, arguments.warm_ups)
        facts: dict[str, object] = {
            "model": f"{named(size)}, {options.dtype}, {'eager' if options.eager else 'compiled'}",
            "device": device(),
            "engines": {name: engines[f"{name} 0"].facts() for name in ENGINES},
        }
    facts["ratios"] = {
        f"{measure} {case} era / {base}": samples.ratio(f"{case} era", f"{case} {base}", measure)
        for case in cases
        for measure in MEASURES
        for base in ("stock", "wide")
    }
    facts["strict"] = {
        "prefill": strict_ratios(samples, "text"),
        "decode": strict_ratios(samples, "text", "decode_"),
    }
    return _report(samples, facts, list(cases), arguments)


def strict_ratios(samples: "Samples", case: str, prefix: str = "") -> dict[str, float]:
    """Return medians over rounds against stock's step with wide attention layers in it.

    Args:
        prefix: Empty for the prefill step, ``decode_`` for a decode step.

    Returns:
        ``layers``: the same step with era's attention layers in it; ``step``: era's own step.
        Empty where a compiled graph hides the layers.
    """
    import statistics

    whole, layers = f"{prefix}language_model", f"{prefix}attention"
    rows = list(
        zip(
            *(samples.of(f"{case} {engine}", whole) for engine in ("era", "stock")),
            *(samples.of(f"{case} {engine}", layers) for engine in ENGINES),
            strict=True,
        )
    )
    if not rows:
        return {}
    judged = [
        (step - stock + era, own, step - stock + wide) for own, step, era, stock, wide in rows
    ]
    return {
        "layers": statistics.median(replaced / judge for replaced, _, judge in judged),
        "step": statistics.median(own / judge for _, own, judge in judged),
    }


def _goals(strict: Mapping[str, Mapping[str, float]]) -> "list[Goal]":
    from era_vllm.lab.bench.report import Goal

    return [
        Goal(f"text-only {key}, {what} against stock*", found.get(what), "at most", GOAL)
        for key, found in strict.items()
        for what in ("layers", "step")
    ]


def _report(
    samples: "Samples", facts: dict[str, object], cases: list[str], arguments: argparse.Namespace
) -> "Report":
    from era_vllm.lab.bench import plots
    from era_vllm.lab.bench.report import Report, shown, table, times

    measures = [measure for measure in MEASURES if samples.of("text stock", measure)]
    rows = [
        [f"{case} {name}", *(shown(samples.median(f"{case} {name}", m)) for m in measures)]
        for case in cases
        for name in ENGINES
    ]
    ratio_rows = [
        [
            f"{case} era / {base}",
            *(times(samples.ratio(f"{case} era", f"{case} {base}", m)) for m in measures),
        ]
        for case in cases
        for base in ("stock", "wide")
    ]
    header = ["medians", *(measure.replace("_", " ") for measure in measures)]
    engines: dict[str, dict[str, object]] = facts["engines"]
    layout = ("head_size", "attention_backend", "kv_blocks", "kv_block_tokens", "kv_tokens")
    held = {name: int(str(fact["kv_tokens"])) for name, fact in engines.items()}
    engine_rows = [
        [name, *(str(engines[name][key]) for key in layout), times(held[name] / held["stock"])]
        for name in ENGINES
    ]
    prefill, decode = (
        ("attention", "decode_attention") if "attention" in measures else ("ttft", "decode")
    )
    plots.bars(
        Path(arguments.out) / "bench-attention.png",
        f"{facts['model']}, {facts['device']}",
        {
            f"{what}, {measure.replace('_', ' ')}": {
                f"{case} {name}": {"ttft": samples.median(f"{case} {name}", measure) or 0.0}
                for case in cases
                for name in ENGINES
            }
            for what, measure in (("prefill", prefill), ("a decode step", decode))
        },
    )
    return Report(
        bench="attention",
        samples=samples,
        tables=(
            table(header, rows),
            table(["median ratios within a round", *header[1:]], ratio_rows),
            table(["engine", *(key.replace("_", " ") for key in layout), "of stock"], engine_rows),
        ),
        goals=_goals(facts["strict"]),
        facts=facts,
        notes=(
            f"{facts['model']}; one request at a time",
            "stock* = stock's step with wide's attention layers; wide's own step has wider "
            "projections too",
        ),
    )
