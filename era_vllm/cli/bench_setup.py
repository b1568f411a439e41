"""What the benchmarks share before an engine exists: options, environment, checkpoint folders.

vLLM reads its environment as it is imported, so this file does not import it.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from era_vllm.cli.options import era_settings
from era_vllm.cli.quiet import QUIET
from era_vllm.errors import ConfigError
from era_vllm.lab.dummy import MAX_CONTEXT, SIZES, LlamaSize

DTYPES: Final = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What all engines of a benchmark have in common."""

    dtype: str
    eager: bool
    kv_bytes: int
    context: int
    """Tokens of a request, of a step, and half of what the cache must hold."""


def set_environment(*, eager: bool) -> None:
    """Make engines live in this process and say little; call before vLLM is imported."""
    from era_vllm.cli.findings import core_count

    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(core_count())}
    if eager:
        own["TORCH_COMPILE_DISABLE"] = "1"
    for name, value in {**QUIET, **own}.items():
        os.environ.setdefault(name, value)


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
        "--dtype", choices=DTYPES, default="bfloat16", help="number format (default %(default)s)"
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


def engine_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the options of a benchmark that runs engines, as they were used."""
    names = ("rounds", "warm_ups", "shape", "dtype", "rates", "text_tokens", "decode_tokens")
    options = engine_options(arguments)
    return {
        **{name: getattr(arguments, name) for name in names},
        "eager": options.eager,
        "kv_bytes": options.kv_bytes,
        "context": options.context,
        "era": era_settings(arguments),
    }


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """Return the engines' options; the same KV cache memory for each."""
    longest = max(arguments.text_tokens, 600) + arguments.decode_tokens
    context = -(-longest // 256) * 256
    if context > MAX_CONTEXT:
        raise ConfigError(
            f"--text-tokens + --decode-tokens: got {longest}, allowed: up to {MAX_CONTEXT}"
        )
    size = SIZES[arguments.shape]
    bytes_per_token = 2 * element_bytes(arguments.dtype) * size.layers * size.hidden
    room = 3 * context * bytes_per_token * 2  # twice: heads may be widened, blocks are whole
    kv_bytes = arguments.kv_mib * 2**20 if arguments.kv_mib else max(room, 32 * 2**20)
    eager = device() == "cpu" if arguments.eager is None else arguments.eager
    return EngineOptions(arguments.dtype, eager, kv_bytes, context)


def element_bytes(dtype: str) -> int:
    """Return the bytes of a number."""
    return 4 if dtype == "float32" else 2


def device() -> str:
    """Return where torch should work."""
    import torch  # a second that `era-vllm --help` can do without

    return "cuda" if torch.cuda.is_available() else "cpu"


def named(size: LlamaSize) -> str:
    """Return a model's description for a reader."""
    tower = "CLIP-L/14-336" if size.tower_layers == 24 else f"{size.tower_layers} layers of CLIP-L"
    return (
        f"{size.parameters / 1e9:.2f} B Llama ({size.layers} layers x {size.hidden}) behind "
        f"{tower}, dummy weights"
    )


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


def check_rates(rates: list[float], settings: Mapping[str, object]) -> None:
    """Refuse rates that the engine would refuse after half a minute."""
    from era_vllm.config import EraConfig

    highest = EraConfig.parse(settings).max_pruning_rate
    if max(rates) > highest:
        raise ConfigError(
            f"--rates: got {max(rates):g}, allowed: [0, {highest:g}] (raise --era-max-pruning-rate)"
        )
