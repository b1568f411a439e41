"""``era-vllm bench reducer``: the pruning step alone, against the tower it follows."""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final

import torch

from era_vllm.bench import plots
from era_vllm.bench.clock import PowerLaw, Samples, interleave, power_law
from era_vllm.bench.options import ReducerOptions
from era_vllm.bench.provenance import free_memory
from era_vllm.bench.pruning_step import Size, reducer_cell, tower, tower_cell
from era_vllm.bench.report import TOWER_SHARE, Goal, Report, percent, shown, table
from era_vllm.bench.setup import FIXED_K, FIXED_N, device
from era_vllm.errors import ConfigError
from era_vllm.lab.dummy import SIZES
from era_vllm.lab.screen import progress
from era_vllm.policies import defaults, make_policy

_GOAL_SIZES: Final = ("576->64", "5 x 576->32", "16 x 1024->102")


def run(options: ReducerOptions, out: Path) -> Report:
    """Measure, and draw."""
    for policy in options.policies:
        make_policy(defaults(policy))
    shape, place = SIZES[options.shape], device()
    dtype = getattr(torch, options.dtype)
    free = torch.cuda.mem_get_info()[0] if place == "cuda" else free_memory()
    free = sys.maxsize if free is None else free  # the system does not tell
    wanted = [Size(*size) for size in options.sizes]
    fitting = [size for size in wanted if size.bytes_needed <= free]
    notes = [
        f"{size} left out: it needs about {size.bytes_needed / 2**30:.1f} GiB, "
        f"{free / 2**30:.1f} GiB are free"
        for size in wanted
        if size not in fitting
    ]
    if not fitting:
        raise ConfigError(f"--sizes: none fits into memory; {'; '.join(notes)}")
    by_n = [Size(n, FIXED_K) for n in options.n_sweep]
    by_k = [Size(FIXED_N, k) for k in options.k_sweep]
    encoder = tower(dtype, place, shape.tower_layers)
    progress(f"{place}, {options.dtype}, {shape.hidden} wide: sizes")
    cells = {}
    for size in fitting:
        cells[f"tower {size}"] = tower_cell(encoder, size.images, dtype, place)
        for policy in options.policies:
            cells[f"{policy} {size}"] = reducer_cell(policy, size, shape.hidden, dtype, place)
    main = interleave(cells, options.rounds, options.warm_ups)
    progress("growth")
    make = partial(reducer_cell, width=shape.hidden, dtype=dtype, device=place)
    # by_n and by_k may share a size, which is then timed once
    cells = {f"{p} {s}": make(p, s) for s in [*by_n, *by_k] for p in options.policies}
    swept = interleave(cells, options.rounds, options.warm_ups)

    shares: dict[str, dict[str, float]] = {policy: {} for policy in options.policies}
    rows: list[list[str]] = []
    for size in fitting:
        base = f"tower {size}"
        for policy in options.policies:
            cell = f"{policy} {size}"
            share = main.ratio(cell, base, "reducer", "tower") or 0.0
            shares[policy][str(size)] = share
            parts = [main.median(cell, measure) for measure in ("prune", "signal", "reducer")]
            whole = shown(main.median(base, "tower"))
            rows.append([f"{size}", policy, *map(shown, parts), whole, percent(share)])
    header = ["tokens", "policy", "prune", "attention", "together", "tower", "share"]
    laws: dict[str, dict[str, tuple[list[int], list[float], PowerLaw | None]]] = {}
    for axis, of_axis in (("n", by_n), ("k", by_k)):
        x = [getattr(size, axis) for size in of_axis]
        y = {p: [swept.median(f"{p} {s}", "prune") or 0.0 for s in of_axis] for p in shares}
        laws[axis] = {p: (x, y[p], power_law(x, y[p]) if len(x) > 1 else None) for p in shares}
    growth = [[p, *(str(laws[axis][p][2] or "-") for axis in laws)] for p in shares]
    title = f"pruning step, {options.dtype}, {shape.hidden} wide, {place}"
    plots.growth(out / "bench-reducer.png", title, shares, TOWER_SHARE, laws)
    goals = [
        Goal.of_tower(f"{p} {size}, share of the tower", shares[p].get(size))
        for size in _GOAL_SIZES
        for p in shares
    ]
    return Report(
        samples=Samples({**main.values, **swept.values}),
        tables=(
            table(header, rows),
            table(["policy", f"N at K = {FIXED_K}", f"K at N = {FIXED_N}"], growth),
        ),
        goals=goals,
        facts={
            "device": place,
            "share_of_tower": shares,
            "growth": {
                axis: {p: asdict(law) if law else None for p, (_, _, law) in of_policy.items()}
                for axis, of_policy in laws.items()
            },
            "images": {str(size): size.images for size in fitting},
        },
        notes=(
            *notes,
            "the step works in float32 whatever the dtype of the tokens; growth is that of the "
            "step alone, without the attention that is read from the tower",
            "the tower is transformers'; the share inside vLLM, whose tower may be faster, is in "
            "era-vllm bench serve",
        ),
    )
