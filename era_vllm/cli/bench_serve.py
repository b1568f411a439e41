"""``era-vllm bench serve``: requests to four engines side by side, and where their time goes."""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
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
    from era_vllm.cli.bench_engines import BenchEngine
    from era_vllm.lab.bench.clock import Cell, Samples
    from era_vllm.lab.bench.report import Goal, Report

DESCRIPTION: Final = """Time requests to an engine that prunes, to stock vLLM, and to a bound.

  era-vllm bench serve                                           the whole comparison
  era-vllm bench serve --rates .889 --rounds 2 --no-profile      a quick look
  era-vllm bench serve --shape 7b --era-policy dpp               LLaVA-1.5-7B's shape

Four engines with dummy weights stay alive in this process and are asked in turn, one request at a
time, the same KV cache memory each; every picture and prompt is new, so no cache answers:

  stock    vLLM as it is, all 576 tokens of a picture; text
  era      this package, each rate of --rates; text
  bound    stock vLLM whose language model is fed the first K projector rows: tower and projector
           run, nothing is selected, heads have their stock size. No reducer can be faster
  wide     stock vLLM, a model whose heads are as wide as era's widened ones; text. Its projections
           are wider too, so it is a mild judge: `era-vllm bench attention` has the strict one

TTFT runs from the call of LLM.generate to the first token. Inside it: tower, projector, reducer
(whatever else happens between pixels and tokens, reading the tower's attention included), merge
(embeddings into the prompt, the biases into their buffer), language model, rest (preprocessing,
scheduling, sampling). torch.compile and CUDA graphs may hide the language model's part. Memory:
four times the model, all at once (0.9b: 2.5 GB each).

Goals: TTFT 2.0x faster at .889 and 2.2x at .944; text within 3 % of `wide`; reducer at most 5 % of
the tower. Writes OUT/bench-serve.json and .png.
"""
RATES: Final = (0.5, 0.778, 0.889, 0.944)
SPEED_GOALS: Final[Mapping[float, float]] = {0.889: 2.0, 0.944: 2.2}
TEXT_GOAL: Final = 1.03
REDUCER_GOAL: Final = 0.05
_GOAL_RATE: Final = 0.889


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    add_common_options(parser, rounds=7)
    add_engine_options(parser, rates=RATES)
    parser.add_argument(
        "--profile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one more pruned request under torch.profiler (default: %(default)s)",
    )
    add_era_options(parser)


def settings(arguments: argparse.Namespace) -> Mapping[str, object]:
    """Return the options as they were used."""
    return {**engine_settings(arguments), "profile": arguments.profile}


def run(arguments: argparse.Namespace) -> "Report":
    """Start the engines, measure, judge and draw."""
    check_rates(arguments.rates, era_settings(arguments))
    size, options = SIZES[arguments.shape], engine_options(arguments)
    set_environment(eager=options.eager)
    progress("importing vLLM")
    with muted():
        from era_vllm.cli import bench_engines as start
    from era_vllm.lab.bench.clock import interleave

    progress(f"starting four engines: {named(size)}")
    with tempfile.TemporaryDirectory() as folder, start.running() as engines:
        narrow, wide = Path(folder) / "narrow", Path(folder) / "wide"
        with muted():
            make_dummy_llava(narrow, size)
            engines["era"] = start.pruned(narrow, options, era_settings(arguments))
            head_size = engines["era"].head_size
            make_dummy_llava(wide, replace(size, head_size=head_size))
            engines["stock"] = start.stock(narrow, options)
            engines["bound"] = start.bound(narrow, options)
            engines["wide"] = start.stock(wide, options)
        for engine in engines.values():
            engine.watch()
        tokens: dict[str, int] = {}
        cells = _cells(engines, arguments, tokens)
        samples = interleave(cells, arguments.rounds, arguments.warm_ups)
        facts: dict[str, object] = {
            "model": f"{named(size)}, {options.dtype}, {'eager' if options.eager else 'compiled'}",
            "device": device(),
            "engines": {name: engine.facts() for name, engine in engines.items()},
            "prompt_tokens": tokens,
            "ratios": _ratios(samples, arguments.rates),
        }
        if arguments.profile:
            cell = cells[f"era {arguments.rates[-1]:g}"]
            progress("profiling")
            facts["profile"] = start.profile(cell)
    return _report(samples, facts, arguments)


def _cells(
    engines: "Mapping[str, BenchEngine]", arguments: argparse.Namespace, tokens: dict[str, int]
) -> "dict[str, Cell]":
    from era_vllm.lab.bench.inputs import image_prompt, noise_pictures, word_prompts

    pictures, words = noise_pictures(IMAGE_SIZE), word_prompts(arguments.text_tokens)

    def image(cell: str, engine: str, rate: float | None) -> Mapping[str, float]:
        prompt = image_prompt(next(pictures), rate)
        taken = engines[engine].ask(prompt, arguments.decode_tokens)
        tokens[cell] = engines[engine].prompt_tokens
        return taken

    def text(engine: str) -> Mapping[str, float]:
        return engines[engine].ask({"prompt_token_ids": next(words)}, arguments.decode_tokens)

    cells: dict[str, Cell] = {"stock": partial(image, "stock", "stock", None)}
    for rate in arguments.rates:
        for engine in ("era", "bound"):
            name = f"{engine} {rate:g}"
            cells[name] = partial(image, name, engine, rate)
    return {**cells, **{f"text {name}": partial(text, name) for name in ("stock", "wide", "era")}}


def _ratios(samples: "Samples", rates: list[float]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for rate in rates:
        own, bound = f"era {rate:g}", f"bound {rate:g}"
        found[f"ttft {own} / stock"] = samples.ratio(own, "stock", "ttft")
        found[f"ttft {bound} / stock"] = samples.ratio(bound, "stock", "ttft")
        found[f"ttft {own} / {bound}"] = samples.ratio(own, bound, "ttft")
        found[f"reducer / tower, {own}"] = samples.ratio(own, own, "reducer", "tower")
    for base in ("wide", "stock"):
        for measure in ("ttft", "decode"):
            found[f"{measure} text era / {base}"] = samples.ratio(
                "text era", f"text {base}", measure
            )
    return found


def judged(ratios: Mapping[str, float | None]) -> "list[Goal]":
    """Hold the ratios against what was asked for."""
    from era_vllm.lab.bench.report import Goal

    goals: list[Goal] = []
    for rate, limit in SPEED_GOALS.items():
        ratio = ratios.get(f"ttft era {rate:g} / stock")
        speed = None if ratio is None else 1 / ratio
        goals.append(Goal(f"TTFT at {rate:g} against stock", speed, "at least", limit))
    for measure, name in (("ttft", "TTFT"), ("decode", "decode")):
        ratio = ratios.get(f"{measure} text era / wide")
        goals.append(Goal(f"text-only {name} against wide", ratio, "at most", TEXT_GOAL))
    share = ratios.get(f"reducer / tower, era {_GOAL_RATE:g}")
    percent = None if share is None else 100 * share
    name = f"reducer at {_GOAL_RATE:g}, share of the tower"
    return [*goals, Goal(name, percent, "at most", 100 * REDUCER_GOAL, " %")]


def _report(
    samples: "Samples", facts: dict[str, object], arguments: argparse.Namespace
) -> "Report":
    from era_vllm.lab.bench import plots
    from era_vllm.lab.bench.report import Report, percent, shown, table, times

    ratios: dict[str, float | None] = facts["ratios"]
    tokens: dict[str, int] = facts["prompt_tokens"]
    images = [cell for cell in samples.values if not cell.startswith("text ")]
    texts = [cell for cell in samples.values if cell.startswith("text ")]
    stages = [stage for stage in plots.STAGES if stage != "ttft" and samples.of("stock", stage)]
    names = [stage.replace("_", " ") for stage in stages]
    header = ["picture", "tokens", "TTFT", "p90", "of stock", "decode", *names, "reducer / tower"]
    rows = [
        [
            cell,
            str(tokens[cell]),
            shown(samples.median(cell, "ttft")),
            shown(samples.p90(cell, "ttft")),
            times(samples.ratio(cell, "stock", "ttft")),
            shown(samples.median(cell, "decode")),
            *(shown(samples.median(cell, stage)) for stage in stages),
            percent(samples.ratio(cell, cell, "reducer", "tower")),
        ]
        for cell in images
    ]
    text_rows = [
        [
            cell,
            *(
                figure
                for measure in ("ttft", "decode")
                for figure in (
                    shown(samples.median(cell, measure)),
                    shown(samples.p90(cell, measure)),
                    times(samples.ratio(cell, "text stock", measure)),
                )
            ),
        ]
        for cell in texts
    ]
    engines: dict[str, dict[str, object]] = facts["engines"]
    layout = ("head_size", "attention_backend", "kv_blocks", "kv_block_tokens", "kv_tokens")
    engine_rows = [[name, *(str(fact[key]) for key in layout)] for name, fact in engines.items()]
    tables = [
        table(header, rows),
        table(["text only", "TTFT", "p90", "of stock", "decode", "p90", "of stock"], text_rows),
        table(["engine", *(key.replace("_", " ") for key in layout)], engine_rows),
    ]
    if profile := facts.get("profile"):
        ops = [[row["name"], shown(row["self_s"]), f"{row['share']:.1%}"] for row in profile]
        tables.append(table([f"era {arguments.rates[-1]:g}, operator", "itself", "share"], ops))

    def parts(cell: str, measures: Sequence[str]) -> dict[str, float]:
        return {measure: samples.median(cell, measure) or 0.0 for measure in measures}

    whole = ["ttft"]
    split = stages if "rest" in stages else whole
    plots.bars(
        Path(arguments.out) / "bench-serve.png",
        f"{facts['model']}, {facts['device']}",
        {
            "time to first token, a picture": {cell: parts(cell, split) for cell in images},
            "time to first token, text only": {cell: parts(cell, whole) for cell in texts},
        },
    )
    return Report(
        bench="serve",
        samples=samples,
        tables=tables,
        goals=judged(ratios),
        facts=facts,
        notes=(
            f"{facts['model']}; one request at a time",
            "`of stock` is the median of ratios within a round; wide's projections are wider too",
        ),
    )
