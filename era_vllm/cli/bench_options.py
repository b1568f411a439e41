"""The options of ``era-vllm bench``, and what they say: parsed, resolved, refused. No torch.

Leaves out the benchmarks (``bench/``) and running one (``bench.py``).
"""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Final

from era_vllm.bench.setup import FIXED_K, FIXED_N, EngineOptions, device
from era_vllm.cli.options import era_settings
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.lab.dummy import MAX_CONTEXT, SIZES
from era_vllm.policies import policy_names

_ELEMENT_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}


def add_common_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the options of every benchmark."""
    parser.add_argument(
        "--rounds",
        type=at_least(1),
        default=rounds,
        metavar="N",
        help="timed (default %(default)s)",
    )
    parser.add_argument(
        "--warm-ups",
        type=at_least(0),
        default=1,
        metavar="N",
        help="rounds run first and thrown away (default %(default)s)",
    )
    parser.add_argument(
        "--shape",
        choices=SIZES,
        default="0.9b",
        help="language model: 0.9b (2048 wide, 17 layers), 7b (LLaVA-1.5-7B: 4096, 32), tiny (to "
        "try the command: its times mean nothing); tower CLIP-L/14-336 (default %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=_ELEMENT_BYTES,
        default="bfloat16",
        help="number format (default %(default)s)",
    )
    parser.add_argument("--out", default="out", metavar="DIR", help="folder (default %(default)s)")


def add_engine_options(
    parser: argparse.ArgumentParser, *, rates: Sequence[float], eager: bool | None = None
) -> None:
    """Add the options of the benchmarks that run engines.

    Args:
        rates: Default.
        eager: Default; None = on a CPU, not on a GPU.
    """
    parser.add_argument(
        "--rates",
        type=numbers(float, 0, 1),
        default=list(rates),
        metavar="R,R",
        help=f"pruning rates (default {','.join(f'{rate:g}' for rate in rates)})",
    )
    parser.add_argument(
        "--text-tokens",
        type=at_least(1),
        default=512,
        metavar="N",
        help="prompt of the text-only requests (default %(default)s)",
    )
    parser.add_argument(
        "--decode-tokens",
        type=at_least(1),
        default=16,
        metavar="N",
        help="tokens decoded after the first (default %(default)s)",
    )
    parser.add_argument(
        "--kv-mib",
        type=at_least(1),
        metavar="N",
        help="KV cache of each engine, MiB (default: room for three requests)",
    )
    parser.add_argument(
        "--eager",
        action=argparse.BooleanOptionalAction,
        default=eager,
        help="no torch.compile and no CUDA graphs (default: "
        + ("on a CPU, not on a GPU)" if eager is None else "%(default)s)"),
    )


def add_reducer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark of the pruning step."""
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


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """Return the engines' options; the same KV cache memory for each.

    Raises:
        ConfigError: a request that no engine takes, or a rate that it would refuse after half a
            minute.
    """
    era = era_settings(arguments)
    highest = EraConfig.parse(era).max_pruning_rate
    if max(arguments.rates) > highest:
        raise ConfigError(
            f"--rates: got {max(arguments.rates):g}, allowed: [0, {highest:g}] "
            "(raise --era-max-pruning-rate)"
        )
    longest = max(arguments.text_tokens, 600) + arguments.decode_tokens
    context = -(-longest // 256) * 256
    if context > MAX_CONTEXT:
        raise ConfigError(
            f"--text-tokens + --decode-tokens: got {longest}, allowed: up to {MAX_CONTEXT}"
        )
    size = SIZES[arguments.shape]
    bytes_per_token = 2 * _ELEMENT_BYTES[arguments.dtype] * size.layers * size.hidden
    room = 3 * context * bytes_per_token * 2  # twice: heads may be widened, blocks are whole
    return EngineOptions(
        rounds=arguments.rounds,
        warm_ups=arguments.warm_ups,
        shape=arguments.shape,
        dtype=arguments.dtype,
        rates=arguments.rates,
        text_tokens=arguments.text_tokens,
        decode_tokens=arguments.decode_tokens,
        eager=device() == "cpu" if arguments.eager is None else arguments.eager,
        kv_bytes=arguments.kv_mib * 2**20 if arguments.kv_mib else max(room, 32 * 2**20),
        context=context,
        era=era,
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


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type: an integer with a lower bound."""

    def parse(text: str) -> int:
        try:
            if (value := int(text)) >= least:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: an integer >= {least}")

    return parse


def numbers(
    kind: type[int] | type[float], least: float, below: float = float("inf")
) -> Callable[[str], list[float]]:
    """Return an argparse type: numbers with commas between, without repeats."""

    def parse(text: str) -> list[float]:
        try:
            found = [kind(part) for part in text.split(",")]
            if all(least <= value < below for value in found) and len(set(found)) == len(found):
                return found
        except ValueError:
            pass
        what = "integers" if kind is int else "numbers"
        raise argparse.ArgumentTypeError(
            f"got {text!r}, allowed: different {what} in [{least:g}, {below:g}), commas between"
        )

    return parse
