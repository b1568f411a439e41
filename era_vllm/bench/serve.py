"""``era-vllm bench serve``: requests to four engines side by side, and where their time goes."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from era_vllm.bench import plots
from era_vllm.bench.clock import Cell, Samples, interleave
from era_vllm.bench.inputs import image_prompt, noise_pictures, word_prompts
from era_vllm.bench.options import EngineOptions, ServeOptions, facts_of
from era_vllm.bench.report import Goal, Report, engine_table, percent, shown, table, times
from era_vllm.bench.setup import Kind, prefill_flops
from era_vllm.lab.screen import progress

if TYPE_CHECKING:
    from era_vllm.bench.engines import TimedEngine

KINDS: Final[Mapping[str, tuple[Kind, bool]]] = {
    "era": ("pruned", False),
    "stock": ("stock", False),
    "bound": ("bound", False),
    "wide": ("stock", True),
}
SPEED_GOALS: Final[Mapping[float, float]] = {0.889: 2.0, 0.944: 2.2}
TEXT_GOAL: Final = 1.03
_GOAL_RATE: Final = 0.889


def run(options: ServeOptions, out: Path) -> Report:
    """Start the engines, measure, judge and draw."""
    from era_vllm.bench.engines import profile
    from era_vllm.bench.sides import side_by_side

    with side_by_side(KINDS, options) as engines:
        for engine in engines.values():
            engine.watch()
        tokens: dict[str, int] = {}
        cells = _cells(engines, options, tokens)
        samples = interleave(cells, options.rounds, options.warm_ups)
        facts = {
            **facts_of(options),
            "engines": {name: engine.facts() for name, engine in engines.items()},
            "prompt_tokens": tokens,
            "prefill_tflops": {
                cell: prefill_flops(options.size, count) / 1e12 for cell, count in tokens.items()
            },
            "ratios": _ratios(samples, options.rates),
        }
        if options.profile:
            progress("profiling")
            facts["profile"] = profile(cells[f"era {options.rates[-1]:g}"])
    return _report(samples, facts, options, out)


def _cells(
    engines: "Mapping[str, TimedEngine]", options: EngineOptions, tokens: dict[str, int]
) -> dict[str, Cell]:
    family = options.asked
    pictures, words = noise_pictures(*family.picture), word_prompts(options.text_tokens)

    def image(cell: str, engine: str, rate: float | None) -> Mapping[str, float]:
        prompt = image_prompt(next(pictures), rate, mark=family.mark)
        taken = engines[engine].ask(prompt, options.decode_tokens)
        tokens[cell] = engines[engine].prompt_tokens
        return taken

    def text(engine: str) -> Mapping[str, float]:
        return engines[engine].ask({"prompt_token_ids": next(words)}, options.decode_tokens)

    cells: dict[str, Cell] = {"stock": partial(image, "stock", "stock", None)}
    for rate in options.rates:
        for engine in ("era", "bound"):
            name = f"{engine} {rate:g}"
            cells[name] = partial(image, name, engine, rate)
    return {**cells, **{f"text {name}": partial(text, name) for name in ("stock", "wide", "era")}}


def _ratios(samples: Samples, rates: list[float]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for rate in rates:
        own, bound = f"era {rate:g}", f"bound {rate:g}"
        found[f"ttft {own} / stock"] = samples.ratio(own, "stock", "ttft")
        found[f"ttft {bound} / stock"] = samples.ratio(bound, "stock", "ttft")
        found[f"ttft {own} / {bound}"] = samples.ratio(own, bound, "ttft")
        for stage in ("reducer", "scout"):
            found[f"{stage} / tower, {own}"] = samples.ratio(own, own, stage, "tower")
    for base in ("wide", "stock"):
        for measure in ("ttft", "decode"):
            found[f"{measure} text era / {base}"] = samples.ratio(
                "text era", f"text {base}", measure
            )
    return found


def judged(ratios: Mapping[str, float | None]) -> list[Goal]:
    """Hold the ratios against what was asked for."""
    goals: list[Goal] = []
    for rate, limit in SPEED_GOALS.items():
        ratio = ratios.get(f"ttft era {rate:g} / stock")
        name = f"TTFT at {rate:g} against stock"
        goals.append(Goal(name, ratio and 1 / ratio, "at least", limit))
    for measure, name in (("ttft", "TTFT"), ("decode", "decode")):
        ratio = ratios.get(f"{measure} text era / wide")
        goals.append(Goal(f"text-only {name} against wide", ratio, "at most", TEXT_GOAL))
    share = ratios.get(f"reducer / tower, era {_GOAL_RATE:g}")
    return [*goals, Goal.of_tower(f"reducer at {_GOAL_RATE:g}, share of the tower", share)]


def _report(
    samples: Samples, facts: dict[str, object], options: EngineOptions, out: Path
) -> Report:
    images = [cell for cell in samples.values if not cell.startswith("text ")]
    texts = [cell for cell in samples.values if cell.startswith("text ")]
    stages = [stage for stage in plots.STAGES if any(samples.of(cell, stage) for cell in images)]

    def timed(cell: str, measure: str, base: str) -> list[str]:
        return [
            shown(samples.median(cell, measure)),
            shown(samples.p90(cell, measure)),
            times(samples.ratio(cell, base, measure)),
        ]

    rows = [
        [
            cell,
            str(facts["prompt_tokens"][cell]),
            f"{facts['prefill_tflops'][cell]:.3g}",
            *timed(cell, "ttft", "stock"),
            *(shown(samples.median(cell, measure)) for measure in ("decode", *stages)),
            percent(samples.ratio(cell, cell, "reducer", "tower")),
            percent(samples.ratio(cell, cell, "scout", "tower")),
        ]
        for cell in images
    ]
    text_rows = [
        [cell, *timed(cell, "ttft", "text stock"), *timed(cell, "decode", "text stock")]
        for cell in texts
    ]
    names = [stage.replace("_", " ") for stage in stages]
    head = ["TTFT", "p90", "of stock", "decode"]
    tables = [
        table(
            ["picture", "tokens", "TFLOP", *head, *names, "reducer / tower", "scout / tower"], rows
        ),
        table(["text only", *head, "p90", "of stock"], text_rows),
        engine_table(facts["engines"]),
    ]
    if profile := facts.get("profile"):
        ops = [[row["name"], shown(row["self_s"]), f"{row['share']:.1%}"] for row in profile]
        tables.append(table([f"era {options.rates[-1]:g}, operator", "itself", "share"], ops))

    whole = ["ttft"]
    split = stages if "rest" in stages else whole
    plots.bars(
        out / "bench-serve.png",
        f"{facts['model']}, {facts['device']}",
        samples,
        {
            "time to first token, a picture": (images, split),
            "time to first token, text only": (texts, whole),
        },
    )
    return Report(
        samples=samples,
        tables=tables,
        goals=judged(facts["ratios"]),
        facts=facts,
        notes=(
            f"{facts['model']}; one request at a time",
            "TFLOP: of the language model's layers over the prompt, computed",
            "the scout's layers are no part of the reducer's share",
            "`of stock` is the median of ratios within a round; wide's projections are wider too",
        ),
    )
