"""The options of ``era-vllm bench``, and what they say: parsed, resolved, refused. No torch.

Leaves out the benchmarks (``bench/``) and running one (``bench.py``).
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import Final

from era_vllm.bench.setup import FIXED_K, FIXED_N, EngineOptions, GapOptions, device, pictured
from era_vllm.cli.options import era_settings
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.lab.dummy import FAMILIES, SIZES, size_of
from era_vllm.policies import policy_names

_ELEMENT_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}


def add_common_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the options of every benchmark."""
    add = partial(_add, parser)
    add("--rounds", at_least(1), rounds, "N", "timed (default %(default)s)")
    add("--warm-ups", at_least(0), 1, "N", "rounds run first and thrown away (default %(default)s)")
    parser.add_argument(
        "--shape",
        choices=SIZES,
        default="0.9b",
        help="language model: 0.9b (2048 wide, 17 layers), 7b (LLaVA-1.5-7B: 4096, 32), 0.2b (4 "
        "layers, and a quarter of the tower's), qwen3-vl-2b (2048, 28, 8 KV heads), tiny (to try "
        "the command: its times mean nothing) "
        "(default %(default)s)",
    )
    what = "number format (default %(default)s)"
    parser.add_argument("--dtype", choices=_ELEMENT_BYTES, default="bfloat16", help=what)
    add("--out", str, "out", "DIR", "folder (default %(default)s)")


def add_engine_options(
    parser: argparse.ArgumentParser, *, rates: Sequence[float], eager: bool | None = None
) -> None:
    """Add the options of the benchmarks that run engines, those of pruning among them.

    Args:
        rates: Default.
        eager: Default; None = on a CPU, not on a GPU.
    """
    add = partial(_add, parser)
    listed = ",".join(f"{rate:g}" for rate in rates)
    parser.add_argument(
        "--family",
        choices=FAMILIES,
        default="llava",
        help="llava (LLaVA-1.5: 576 tokens a picture), llava-next (an overview, 4 tiles: 2,928), "
        "internvl (4 tiles, a thumbnail: 1,280), qwen3-vl (1024 x 1024 pixels: 1,024) "
        "(default %(default)s)",
    )
    text = "pixels of a picture's side, where a family takes any (default: the family's)"
    add("--side", at_least(1), None, "N", text)
    add("--rates", numbers(float, 0, 1), list(rates), "R,R", f"pruning rates (default {listed})")
    text = "prompt of the text-only requests (default %(default)s)"
    add("--text-tokens", at_least(1), 512, "N", text)
    text = "tokens decoded after the first (default %(default)s)"
    add("--decode-tokens", at_least(1), 16, "N", text)
    text = "KV cache of each engine, MiB (default: room for three requests)"
    add("--kv-mib", at_least(1), None, "N", text)
    usual = "on a CPU, not on a GPU" if eager is None else "%(default)s"
    add_switch(parser, "--eager", eager, f"no torch.compile and no CUDA graphs (default: {usual})")


def add_reducer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark of the pruning step."""
    add = partial(_add, parser)
    names, fit = f"of {', '.join(policy_names())} (default era,dpp)", "one value = no fit (default"
    add("--policies", lambda text: text.split(","), ["era", "dpp"], "P,P", names)
    usual = "576:64,5x576:32,2880:160,16x1024:102,16384:1638"
    add("--sizes", sizes, usual, "SxN:K,N:K", "(default %(default)s)")
    text = f"at K = {FIXED_K}; {fit} %(default)s)"
    add("--n-sweep", numbers(int, FIXED_K + 1), "256,576,1024,2304,4096", "N,N", text)
    text = f"at N = {FIXED_N}; {fit} %(default)s)"
    add("--k-sweep", numbers(int, 1, FIXED_N), "16,32,64,128,256,512", "K,K", text)


def add_segments_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark of blocks of a large picture."""
    add = partial(_add, parser)
    names = f"of {', '.join(policy_names())} (default era,dpp)"
    add("--policies", lambda text: text.split(","), ["era", "dpp"], "P,P", names)
    add("--tokens", squares, "4096,16384", "N,N", "of a picture, squares (default %(default)s)")
    text = "tokens of a block, at most (default %(default)s; whole is always there)"
    add("--segments", numbers(int, 16), "1024,2048,4096", "N,N", text)
    add("--rate", one_rate, 0.944, "R", "of noise and photos (default %(default)s)")
    add("--answer-rate", one_rate, 0.889, "R", "of the questions (default %(default)s)")
    text = "of the tower that the reducer is held against; 4 a token (default %(default)s)"
    add("--patches", at_least(64), 16384, "N", text)
    add("--tower-layers", at_least(1), 1, "N", "timed, and multiplied (default %(default)s)")
    add("--slow-s", float, 30.0, "S", "what takes so long is timed once (default %(default)s)")
    add("--photos", at_least(1), 3, "N", "the held out ones first (default %(default)s)")
    add("--pictures", at_least(1), 150, "N", "asked about, 4 questions each (default %(default)s)")


def add_gap_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark of a stream's pauses."""
    add = partial(_add, parser)
    parser.set_defaults(warm_ups=0)  # every engine answers two pictures first
    add("--pictures", at_least(1), 64, "N", "that arrive at once (default %(default)s)")
    text = "vLLM's --max-num-batched-tokens, which is also its encoder's (default %(default)s)"
    add("--step-tokens", at_least(1), 2048, "N", text)
    add("--kv-mib", at_least(1), 1024, "N", "KV cache of each engine, MiB (default %(default)s)")
    add("--rate", numbers(float, 0, 1), [0.889], "R", "pruning rate (default .889)")
    text = "no torch.compile and no CUDA graphs (default: on a CPU, not on a GPU)"
    add_switch(parser, "--eager", None, text)


def gap_options(arguments: argparse.Namespace) -> GapOptions:
    """Return the options of the benchmark of a stream's pauses.

    Raises:
        ConfigError: a rate that an engine would refuse.
    """
    era = era_settings(arguments)
    _check_rates(arguments.rate, era)
    resolved = {
        "rate": arguments.rate[0],
        "eager": device() == "cpu" if arguments.eager is None else arguments.eager,
        "era": era,
    }
    as_given = {field.name for field in fields(GapOptions)} - resolved.keys()
    return GapOptions(**resolved, **{name: getattr(arguments, name) for name in as_given})


def add_switch(parser: argparse.ArgumentParser, name: str, default: object, text: str) -> None:
    """Add a flag with its ``--no-`` counterpart."""
    on_off = argparse.BooleanOptionalAction
    parser.add_argument(name, action=on_off, default=default, help=text)


def _add(
    parser: argparse.ArgumentParser,
    name: str,
    read: Callable[[str], object],
    default: object,
    metavar: str,
    text: str,
) -> None:
    parser.add_argument(name, type=read, default=default, metavar=metavar, help=text)


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """Return the engines' options; the same KV cache memory for each.

    Raises:
        ConfigError: a request that no engine takes, or a rate that it would refuse after half a
            minute.
    """
    era = era_settings(arguments)
    _check_rates(arguments.rates, era)
    _check_side(arguments.side, FAMILIES[arguments.family].unit)
    asked = pictured(arguments.family, arguments.side)
    of_picture = asked.tokens + 24  # of the question
    longest = max(arguments.text_tokens, of_picture) + arguments.decode_tokens
    context = -(-longest // 256) * 256
    if context > asked.context:
        raise ConfigError(
            f"--text-tokens + --decode-tokens: got {longest}, allowed: up to {asked.context}"
        )
    size = size_of(arguments.shape, arguments.family)
    bytes_per_token = 2 * _ELEMENT_BYTES[arguments.dtype] * size.layers * size.kv_width
    room = 3 * context * bytes_per_token * 2  # twice: heads may be widened, blocks are whole
    resolved = {
        "eager": device() == "cpu" if arguments.eager is None else arguments.eager,
        "kv_bytes": arguments.kv_mib * 2**20 if arguments.kv_mib else max(room, 32 * 2**20),
        "context": context,
        "era": era,
    }
    as_given = {field.name for field in fields(EngineOptions)} - resolved.keys()
    return EngineOptions(**resolved, **{name: getattr(arguments, name) for name in as_given})


def _check_rates(rates: Sequence[float], era: Mapping[str, object]) -> None:
    highest = EraConfig.parse(era).max_pruning_rate
    if max(rates) > highest:
        raise ConfigError(
            f"--rates: got {max(rates):g}, allowed: [0, {highest:g}] (raise --era-max-pruning-rate)"
        )


def _check_side(side: int | None, unit: int | None) -> None:
    if side is not None and (unit is None or side % unit):
        allowed = "no --side, its pictures have one size" if unit is None else f"times of {unit}"
        raise ConfigError(f"--side: got {side}, allowed with this --family: {allowed}")


def sizes(text: str) -> list[tuple[int, int, int]]:
    """Parse ``SxN:K,N:K`` into (n, k, segments)."""
    parts = [re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*):([1-9]\d*)", p) for p in text.split(",")]
    if not all(parts):
        raise _refused(text, "allowed: SxN:K or N:K with commas between (5x576:32,576:64)")
    found = [(int(p[2]), int(p[3]), int(p[1] or 1)) for p in parts if p]
    if wrong := [f"{n}:{k}" for n, k, _ in found if k >= n]:
        raise argparse.ArgumentTypeError(f"got {', '.join(wrong)}, needed K < N")
    return found


def squares(text: str) -> list[int]:
    """Parse squares of integers with commas between."""
    found = numbers(int, 16)(text)
    if wrong := [n for n in found if math.isqrt(n) ** 2 != n]:
        raise _refused(", ".join(map(str, wrong)), "allowed: squares (4096, 16384)")
    return found


def one_rate(text: str) -> float:
    """Parse a pruning rate."""
    found = numbers(float, 0, 1)(text)
    if len(found) > 1:
        raise _refused(text, "allowed: one number in [0, 1)")
    return found[0]


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type: an integer with a lower bound."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            if (value := int(text)) >= least:
                return value
        raise _refused(text, f"allowed: an integer >= {least}")

    return parse


def numbers(
    kind: type[int] | type[float], least: float, below: float = float("inf")
) -> Callable[[str], list[float]]:
    """Return an argparse type: numbers with commas between, without repeats."""

    def parse(text: str) -> list[float]:
        with suppress(ValueError):
            found = [kind(part) for part in text.split(",")]
            if all(least <= value < below for value in found) and len(set(found)) == len(found):
                return found
        what = "integers" if kind is int else "numbers"
        bounds = f"[{least:g}, {below:g})"
        raise _refused(text, f"allowed: different {what} in {bounds}, commas between")

    return parse


def _refused(text: str, needed: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"got {text!r}, {needed}")
