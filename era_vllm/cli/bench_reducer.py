"""``era-vllm bench reducer``: the pruning step alone, against the tower it follows."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from era_vllm.cli.bench_setup import add_common_options, device, numbers
from era_vllm.cli.quiet import progress
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.policies import make_policy, policy_names

if TYPE_CHECKING:
    from era_vllm.lab.bench.fit import PowerLaw
    from era_vllm.lab.bench.reducer import Size
    from era_vllm.lab.bench.report import Report

DESCRIPTION: Final = """Time the pruning step alone (choose, merge, bias) on random tokens.

  era-vllm bench reducer                                      all sizes, both policies, growth
  era-vllm bench reducer --sizes 576:64 --n-sweep 256,576 --k-sweep 16,64 --rounds 3    a minute

A size is S x N:K, S segments of N tokens that become K each. 576:64 is a LLaVA-1.5 image. 2,880 ->
160 (a LLaVA-NeXT image) and 16,384 -> 1,638 (a long video) are pruned in segments: tile by tile
(5x576:32) and chunk by chunk (16x1024:102). As one segment (2880:160, 16384:1638) they are there to
compare: work grows with N squared. Beside each the vision tower, CLIP-L/14-336 with random weights
on the same device and in the same dtype, in one batch of as many images as make those tokens. A
policy that reads the encoder's attention is charged for recomputing it. Sizes without enough memory
are skipped with a word.

Growth: N is varied at K = 64, K at N = 2,304; the exponent is a least squares fit on logarithms.
Goal: at most 5 % of the tower for an image, its tiles and a video's chunks. Writes
OUT/bench-reducer.json and .png.
"""
FIXED_K: Final = 64
FIXED_N: Final = 2304
GOAL: Final = 0.05
_GOAL_SIZES: Final = ("576->64", "5 x 576->32", "16 x 1024->102")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    add_common_options(parser, rounds=5)
    parser.add_argument(
        "--policies",
        type=lambda text: text.split(","),
        default=["era", "dpp"],
        metavar="P,P",
        help=f"of {', '.join(policy_names())} (default era,dpp)",
    )
    parser.add_argument(
        "--sizes",
        type=sizes,
        default="576:64,5x576:32,2880:160,16x1024:102,16384:1638",
        metavar="SxN:K,N:K",
        help="(default %(default)s)",
    )
    parser.add_argument(
        "--n-sweep",
        type=numbers(int, FIXED_K + 1),
        default="256,576,1024,2304,4096",
        metavar="N,N",
        help=f"at K = {FIXED_K}; one value = no fit (default %(default)s)",
    )
    parser.add_argument(
        "--k-sweep",
        type=numbers(int, 1, FIXED_N),
        default="16,32,64,128,256,512",
        metavar="K,K",
        help=f"at N = {FIXED_N}; one value = no fit (default %(default)s)",
    )


def sizes(text: str) -> list[tuple[int, int, int]]:
    """Parse ``SxN:K,N:K`` into (n, k, segments)."""
    parts = [re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*):([1-9]\d*)", p) for p in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, allowed: SxN:K or N:K with commas between (5x576:32,576:64)"
        )
    found = [(int(p[2]), int(p[3]), int(p[1] or 1)) for p in parts if p]
    if wrong := [f"{n}:{k}" for n, k, _ in found if k >= n]:
        raise argparse.ArgumentTypeError(f"got {', '.join(wrong)}, needed K < N")
    return found


def run(arguments: argparse.Namespace) -> "Report":
    """Measure, and draw."""
    import torch

    from era_vllm.lab.bench import plots
    from era_vllm.lab.bench.clock import interleave
    from era_vllm.lab.bench.reducer import Size, reducer_cell, tower, tower_cell
    from era_vllm.lab.bench.report import Goal, Report, percent, shown, table
    from era_vllm.lab.dummy import SIZES

    for policy in arguments.policies:
        make_policy(EraConfig(policy=policy))
    shape, place = SIZES[arguments.shape], device()
    dtype = getattr(torch, arguments.dtype)
    wanted = [Size(*size) for size in arguments.sizes]
    fitting, notes = _fitting(wanted, place)
    if not fitting:
        raise ConfigError(f"--sizes: none fits into memory; {'; '.join(notes)}")
    by_n = [Size(n, FIXED_K) for n in arguments.n_sweep]
    by_k = [Size(FIXED_N, k) for k in arguments.k_sweep]
    encoder = tower(dtype, place, shape.tower_layers)
    progress(f"{place}, {arguments.dtype}, {shape.hidden} wide: sizes")
    cells = {}
    for size in fitting:
        cells[f"tower {size}"] = tower_cell(encoder, size.images, dtype, place)
        for policy in arguments.policies:
            cells[f"{policy} {size}"] = reducer_cell(policy, size, shape.hidden, dtype, place)
    main = interleave(cells, arguments.rounds, arguments.warm_ups)
    progress("growth")
    make = partial(reducer_cell, width=shape.hidden, dtype=dtype, device=place)
    # by_n and by_k may share a size, which is then timed once
    cells = {f"{p} {s}": make(p, s) for s in [*by_n, *by_k] for p in arguments.policies}
    swept = interleave(cells, arguments.rounds, arguments.warm_ups)

    shares: dict[str, dict[str, float]] = {policy: {} for policy in arguments.policies}
    rows: list[list[str]] = []
    for size in fitting:
        base = f"tower {size}"
        for policy in arguments.policies:
            cell = f"{policy} {size}"
            share = main.ratio(cell, base, "reducer", "tower") or 0.0
            shares[policy][str(size)] = share
            parts = [main.median(cell, measure) for measure in ("prune", "signal", "reducer")]
            whole = shown(main.median(base, "tower"))
            rows.append([f"{size}", policy, *map(shown, parts), whole, percent(share)])
    header = ["tokens", "policy", "prune", "attention", "together", "tower", "share"]
    laws = {
        "n": {p: _law([(s.n, swept.median(f"{p} {s}", "prune")) for s in by_n]) for p in shares},
        "k": {p: _law([(s.k, swept.median(f"{p} {s}", "prune")) for s in by_k]) for p in shares},
    }
    growth = [
        [policy, *(_exponent(laws[axis][policy][2]) for axis in ("n", "k"))] for policy in shares
    ]
    title = f"pruning step, {arguments.dtype}, {shape.hidden} wide, {place}"
    plots.growth(Path(arguments.out) / "bench-reducer.png", title, shares, GOAL, laws)
    goals = [
        Goal(
            f"{policy} {size}, share of the tower",
            None if (share := shares[policy].get(size)) is None else 100 * share,
            "at most",
            100 * GOAL,
            " %",
        )
        for size in _GOAL_SIZES
        for policy in shares
    ]
    return Report(
        bench="reducer",
        samples=type(main)({**main.values, **swept.values}),
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


def _fitting(wanted: "Sequence[Size]", place: str) -> "tuple[list[Size], list[str]]":
    from era_vllm.lab.bench.reducer import free_bytes

    left = free_bytes(place)
    short = [size for size in wanted if left is not None and size.bytes_needed > left]
    notes = [
        f"{size} left out: it needs about {size.bytes_needed / 2**30:.1f} GiB, "
        f"{(left or 0) / 2**30:.1f} GiB are free"
        for size in short
    ]
    return [size for size in wanted if size not in short], notes


def _law(
    points: Sequence[tuple[int, float | None]],
) -> "tuple[list[int], list[float], PowerLaw | None]":
    from era_vllm.lab.bench.fit import power_law

    x, y = [point[0] for point in points], [point[1] or 0.0 for point in points]
    return x, y, power_law(x, y) if len(x) > 1 else None


def _exponent(law: "PowerLaw | None") -> str:
    return "-" if law is None else f"{law.exponent:.2f} (R2 {law.r_squared:.3f})"


def settings(arguments: argparse.Namespace) -> Mapping[str, object]:
    """Return the options as they were used."""
    names = ("rounds", "warm_ups", "shape", "dtype", "policies", "sizes", "n_sweep", "k_sweep")
    return {name: getattr(arguments, name) for name in names}
