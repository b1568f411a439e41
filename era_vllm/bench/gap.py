"""``era-vllm bench gap``: the longest pause of a running stream while pictures arrive."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

from era_vllm.bench import plots
from era_vllm.bench.clock import Cell, Samples, interleave
from era_vllm.bench.gap_engines import GapEngine
from era_vllm.bench.inputs import image_prompt, noise_pictures
from era_vllm.bench.options import GapOptions, facts_of
from era_vllm.bench.report import Goal, Report, shown, table, times
from era_vllm.bench.setup import Kind
from era_vllm.bench.sides import side_by_side

KINDS: Final[Mapping[str, tuple[Kind, bool]]] = {
    "stock": ("stock", False),
    "era": ("pruned", False),
    "era, not bounded": ("unbounded", False),
}
GOAL: Final = 1.0


def run(options: GapOptions, out: Path) -> Report:
    """Start the engines, measure, judge and draw."""
    encoded: dict[str, int] = {}
    step = {"max_num_batched_tokens": options.step_tokens, "max_num_seqs": options.pictures + 1}
    with side_by_side(KINDS, options, step) as started:
        engines = {kind: GapEngine(engine) for kind, engine in started.items()}
        samples = interleave(_cells(engines, options, encoded), options.rounds, options.warm_ups)
    facts: dict[str, object] = {
        **facts_of(options),
        "most_pictures_between_two_tokens": encoded,
        "pictures_within_the_budget": max(1, options.step_tokens // options.asked.tokens),
    }
    return _report(samples, facts, options, out)


def _cells(
    engines: Mapping[str, GapEngine], options: GapOptions, encoded: dict[str, int]
) -> dict[str, Cell]:
    pictures = noise_pictures(*options.asked.picture)

    def one(kind: str, number: int) -> Mapping[str, float]:
        rate = None if kind == "stock" else options.rate
        prompts = [image_prompt(next(pictures), rate) for _ in range(number)]
        taken, most = engines[kind].gap(prompts)
        encoded[kind] = max(most, encoded.get(kind, 0))
        return taken

    for kind in engines:
        one(kind, 2)  # the first pass of each shape is slow
    return {kind: partial(one, kind, options.pictures) for kind in engines}


def _report(samples: Samples, facts: dict[str, object], options: GapOptions, out: Path) -> Report:
    encoded = facts["most_pictures_between_two_tokens"]
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
    title = f"longest pause of a stream while {options.pictures} pictures arrive"
    panels = {title: (list(samples.values), ["tower", "rest"])}
    plots.bars(out / "bench-gap.png", f"{facts['model']}, {facts['device']}", samples, panels)
    return Report(
        samples=samples,
        tables=[table([*header, "of stock"], rows)],
        goals=[Goal("longest pause of a stream against stock", ratios["era"], "at most", GOAL)],
        facts=facts,
        notes=(
            f"{facts['model']}; {options.pictures} pictures at once, rate {options.rate:g}",
            f"vLLM's budget of a step, {options.step_tokens} rows, is "
            f"{facts['pictures_within_the_budget']} pictures of {options.asked.tokens}",
        ),
    )
