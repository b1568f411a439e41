"""``era-vllm bench segments``: what it costs and changes to prune a large picture in blocks."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

from era_vllm.bench import plots
from era_vllm.bench.block_cost import QWEN3_VL, cases, cost, named, shares
from era_vllm.bench.block_fidelity import answers, on_photos
from era_vllm.bench.clock import Samples
from era_vllm.bench.options import SegmentsOptions
from era_vllm.bench.report import Goal, Report, percent, shown, table
from era_vllm.bench.setup import device
from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.screen import progress
from era_vllm.policies import defaults, make_policy

_SAMPLE_KEYS: Final = ("mean_relative", "bias", "largest_relative", "anchors_shared")


def run(options: SegmentsOptions, out: Path) -> Report:
    """Measure, and draw."""
    place = device()
    for policy in options.policies:
        make_policy(defaults(policy))
    progress(f"{place}, {options.dtype}: time and memory")
    samples, memory = cost(options, place)
    progress("photos")
    oracle = Oracle(str(CHECKPOINT))
    fidelity, sampling = on_photos(oracle, options)
    progress("questions")
    answered = answers(oracle, options)

    rows: list[list[str]] = []
    for case in cases(options, options.tokens):
        (n, _, policy), name = case, named(case)
        found = fidelity[name]
        rows.append(
            [
                name,
                shown(samples.median(name, "prune")),
                percent(samples.ratio(name, named((n, n, policy)), "prune")),
                "-" if (used := memory[name]) is None else f"{used / 2**20:.0f} MiB",
                f"{found['one_minus_cos']:.4f}",
                f"{found['relative_mse']:.4f}",
                percent(found["shared_with_whole"]),
            ]
        )
    header = ["tokens, block, policy", "prune", "of whole", "memory", "1 - cos", "MSE", "shared"]
    of_tower = shares(samples, options)
    scored = [
        [
            name,
            f"{of.right} of {of.asked}",
            f"{gain.value:+.1%}",
            f"{gain.low:+.1%} to {gain.high:+.1%}",
        ]
        for name, (of, gain) in answered.items()
    ]
    sampled = [
        [name, *(percent(one[key]) for key in _SAMPLE_KEYS)] for name, one in sampling.items()
    ]
    default = EraConfig().max_segment
    block = "whole" if default >= options.patches // 4 else default
    goals = [
        Goal.of_tower(
            f"{policy}, blocks of {default}: share of a tower of {options.patches} patches",
            of_tower.get(f"{policy} {block}"),
        )
        for policy in options.policies
    ]
    title = f"segments at rate {options.rate:g}, {options.dtype}, {place}"
    plots.segments(out / "bench-segments.png", title, _curves(samples, fidelity, options), answered)
    once = [name for name in memory if len(samples.of(name, "prune")) < options.rounds]
    return Report(
        samples=samples,
        tables=(
            table(header, rows),
            table(
                ["share of the tower", "reducer"], [[k, percent(v)] for k, v in of_tower.items()]
            ),
            table(["answers, blocks of", "right", "against whole", "95 %"], scored),
            table(
                ["a sample of queries", *(key.replace("_", " ") for key in _SAMPLE_KEYS)], sampled
            ),
        ),
        goals=goals,
        facts={
            "device": place,
            "threads": torch.get_num_threads(),
            "peak_bytes": memory,
            "fidelity": fidelity,
            "share_of_tower": of_tower,
            "tower": {**asdict(QWEN3_VL), "patches": options.patches},
            "answers": {
                name: {**asdict(of), "against_whole": asdict(gain)}
                for name, (of, gain) in answered.items()
            },
            "sample_of_queries": sampling,
        },
        notes=(
            *(f"{name}: timed once, in the pass that memory was measured in" for name in once),
            f"tower: {options.tower_layers} of {QWEN3_VL.layers} layers were timed and multiplied; "
            "patch embedding and merger are left out",
            "photos: held out ones first, enlarged; features and attention of the sample model's "
            "tower, tile by tile",
            "answers: the sample model in plain transformers, 144 tokens a picture",
        ),
    )


def _curves(
    samples: Samples, fidelity: Mapping[str, Mapping[str, float]], options: SegmentsOptions
) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Return panel -> line -> blocks' tokens and values."""
    panels: dict[str, dict[str, tuple[list[int], list[float]]]] = {
        "seconds (medians)": {},
        "mean 1 - cos of a token to its row": {},
        "anchors shared with whole, %": {},
    }
    for case in cases(options, options.tokens):
        (n, most, policy), name = case, named(case)
        values = (
            samples.median(name, "prune") or 0.0,
            fidelity[name]["one_minus_cos"],
            100 * fidelity[name]["shared_with_whole"],
        )
        for lines, value in zip(panels.values(), values, strict=True):
            x, y = lines.setdefault(f"{policy}, {n} tokens", ([], []))
            x.append(most)
            y.append(value)
    return panels
