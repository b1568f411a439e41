"""``era-vllm bench gap``: the longest pause of a running stream while pictures arrive."""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from era_vllm.cli.bench_setup import (
    EngineOptions,
    add_common_options,
    at_least,
    check_rates,
    device,
    named,
    numbers,
    set_environment,
)
from era_vllm.cli.options import add_era_options, era_settings
from era_vllm.cli.quiet import muted, progress
from era_vllm.lab.dummy import IMAGE_SIZE, IMAGE_TOKENS, MAX_CONTEXT, SIZES, make_dummy_llava

if TYPE_CHECKING:
    from era_vllm.cli.bench_gap_engines import GapEngine
    from era_vllm.lab.bench.clock import Cell, Samples
    from era_vllm.lab.bench.report import Report

DESCRIPTION: Final = """Measure what a running stream waits for while new pictures arrive.

  era-vllm bench gap                                   64 pictures at .889
  era-vllm bench gap --shape tiny --pictures 16        a quick look

A stream of text decodes; then all pictures come at once, one a request, each new to every cache.
Timed is the longest time between two tokens of the stream (preparing the prompts left out: in a
server another process does that), until every picture has its first token. Three engines with
dummy weights stay alive in this process and are asked in turn:

  stock              vLLM as it is, all 576 tokens of a picture
  era                this package: a step encodes as many rows as vLLM profiled memory for
  era, not bounded   the same, scheduled by vLLM's own class, which counts a picture's K tokens

Goal: the longest pause is at most 1.1x stock's. Memory: three times the model, all at once. Writes
OUT/bench-gap.json and .png.
"""
ENGINES: Final = ("stock", "era", "era, not bounded")
GOAL: Final = 1.1
"""Two identical engines in one process differ by up to 5 %, and each has its own."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    add_common_options(parser, rounds=1)
    parser.set_defaults(warm_ups=0)  # every engine answers two pictures first
    for flag, default, what in (
        ("--pictures", 64, "that arrive at once"),
        ("--step-tokens", 2048, "vLLM's --max-num-batched-tokens, which is also its encoder's"),
        ("--kv-mib", 1024, "KV cache of each engine, MiB"),
    ):
        parser.add_argument(
            flag,
            type=at_least(1),
            default=default,
            metavar="N",
            help=f"{what} (default {default})",
        )
    parser.add_argument(
        "--rate",
        type=numbers(float, 0, 1),
        default=[0.889],
        metavar="R",
        help="pruning rate (default .889)",
    )
    parser.add_argument(
        "--eager",
        action=argparse.BooleanOptionalAction,
        help="no torch.compile and no CUDA graphs (default: on a CPU, not on a GPU)",
    )
    add_era_options(parser)


def settings(arguments: argparse.Namespace) -> Mapping[str, object]:
    """Return the options as they were used."""
    names = ("rounds", "warm_ups", "shape", "dtype", "pictures", "step_tokens", "kv_mib", "rate")
    return {
        **{name: getattr(arguments, name) for name in names},
        "eager": _eager(arguments),
        "era": era_settings(arguments),
    }


def run(arguments: argparse.Namespace) -> "Report":
    """Start the engines, measure, judge and draw."""
    check_rates(arguments.rate, era_settings(arguments))
    size = SIZES[arguments.shape]
    context = min(MAX_CONTEXT, 1024 + 2 * arguments.pictures)  # the stream has a token a step
    kv_bytes = arguments.kv_mib * 2**20
    options = EngineOptions(arguments.dtype, _eager(arguments), kv_bytes, context)
    set_environment(eager=options.eager)
    progress("importing vLLM")
    with muted():
        from era_vllm.cli import bench_gap_engines as start
    from era_vllm.lab.bench.clock import interleave

    progress(f"starting {len(ENGINES)} engines: {named(size)}")
    engines: dict[str, GapEngine] = {}
    encoded: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_dummy_llava(Path(folder), size)
        try:
            for kind in ENGINES:
                with muted():
                    given = start.arguments(Path(folder), kind, era_settings(arguments))
                    engines[kind] = start.GapEngine(
                        given, options, arguments.step_tokens, arguments.pictures
                    )
            cells = _cells(engines, arguments, encoded)
            samples = interleave(cells, arguments.rounds, arguments.warm_ups)
        finally:
            for engine in engines.values():
                engine.stop()
    facts: dict[str, object] = {
        "model": f"{named(size)}, {options.dtype}, {'eager' if options.eager else 'compiled'}",
        "device": device(),
        "most_pictures_between_two_tokens": encoded,
        "pictures_within_the_budget": max(1, arguments.step_tokens // IMAGE_TOKENS),
    }
    return _report(samples, facts, arguments)


def _cells(
    engines: "Mapping[str, GapEngine]", arguments: argparse.Namespace, encoded: dict[str, int]
) -> "dict[str, Cell]":
    from era_vllm.lab.bench.inputs import image_prompt, noise_pictures

    pictures = noise_pictures(IMAGE_SIZE)

    def one(kind: str, number: int) -> Mapping[str, float]:
        rate = None if kind == "stock" else arguments.rate[0]
        found = asdict(
            engines[kind].gap([image_prompt(next(pictures), rate) for _ in range(number)])
        )
        encoded[kind] = max(found.pop("pictures"), encoded.get(kind, 0))
        return {name.removesuffix("_s"): seconds for name, seconds in found.items()}

    for kind in engines:
        one(kind, 2)  # the first pass of each shape is slow
    return {kind: partial(one, kind, arguments.pictures) for kind in engines}


def _eager(arguments: argparse.Namespace) -> bool:
    return device() == "cpu" if arguments.eager is None else arguments.eager


def _report(
    samples: "Samples", facts: dict[str, object], arguments: argparse.Namespace
) -> "Report":
    from era_vllm.lab.bench import plots
    from era_vllm.lab.bench.report import Goal, Report, shown, table, times

    encoded: dict[str, int] = facts["most_pictures_between_two_tokens"]
    ratios = {kind: samples.ratio(kind, "stock", "longest") for kind in samples.values}
    facts["longest_of_stock"] = ratios
    rows = [
        [
            kind,
            str(encoded[kind]),
            *(shown(samples.median(kind, name)) for name in ("longest", "tower", "quiet", "all")),
            times(ratios[kind]),
        ]
        for kind in samples.values
    ]
    header = ["engine", "pictures at once", "longest pause", "of it tower", "before", "all"]
    medians = {
        kind: {name: samples.median(kind, name) or 0.0 for name in ("longest", "tower")}
        for kind in samples.values
    }
    bars = {
        kind: {"tower": parts["tower"], "rest": parts["longest"] - parts["tower"]}
        for kind, parts in medians.items()
    }
    title = f"longest pause of a stream while {arguments.pictures} pictures arrive"
    path = Path(arguments.out) / "bench-gap.png"
    plots.bars(path, f"{facts['model']}, {facts['device']}", {title: bars})
    return Report(
        bench="gap",
        samples=samples,
        tables=[table([*header, "of stock"], rows)],
        goals=[Goal("longest pause of a stream against stock", ratios["era"], "at most", GOAL)],
        facts=facts,
        notes=(
            f"{facts['model']}; {arguments.pictures} pictures at once, rate {arguments.rate[0]:g}",
            f"vLLM's budget of a step, {arguments.step_tokens} rows, is "
            f"{facts['pictures_within_the_budget']} pictures of {IMAGE_TOKENS}",
        ),
    )
