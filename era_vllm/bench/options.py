"""The options of each benchmark: its flags and the keys of its JSON, declared once. No torch.

Leaves out the ``--era-*`` flags (``cli/options.py``) and running a benchmark (``cli/bench.py``).
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from operator import methodcaller
from typing import Any, ClassVar, Final

from era_vllm.bench.setup import FIXED_K, FIXED_N, device, named
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.lab.dummy import FAMILIES, SIZES, DummyFamily, LlamaSize, size_of
from era_vllm.policies import policy_names

_ELEMENT_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
_POLICIES: Final = f"of {', '.join(policy_names())} (default era,dpp)"
_SPLIT: Final = methodcaller("split", ",")
_FIT: Final = "one value = no fit (default %(default)s)"
_EAGER: Final = "no torch.compile and no CUDA graphs"


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


def one_rate(text: str) -> float:
    """Parse a pruning rate."""
    found = numbers(float, 0, 1)(text)
    if len(found) > 1:
        raise _refused(text, "allowed: one number in [0, 1)")
    return found[0]


def squares(text: str) -> list[int]:
    """Parse squares of integers with commas between."""
    found = numbers(int, 16)(text)
    if wrong := [n for n in found if math.isqrt(n) ** 2 != n]:
        raise _refused(", ".join(map(str, wrong)), "allowed: squares (4096, 16384)")
    return found


def sizes(text: str) -> list[tuple[int, int, int]]:
    """Parse ``SxN:K,N:K`` into (n, k, segments)."""
    parts = [re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*):([1-9]\d*)", p) for p in text.split(",")]
    if not all(parts):
        raise _refused(text, "allowed: SxN:K or N:K with commas between (5x576:32,576:64)")
    found = [(int(p[2]), int(p[3]), int(p[1] or 1)) for p in parts if p]
    if wrong := [f"{n}:{k}" for n, k, _ in found if k >= n]:
        raise argparse.ArgumentTypeError(f"got {', '.join(wrong)}, needed K < N")
    return found


def _refused(text: str, needed: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"got {text!r}, {needed}")


def flag(  # noqa: ANN401  # as ``field``
    default: object,
    text: str,
    read: Callable[[str], object] | None = None,
    metavar: str = "",
    **more: object,
) -> Any:
    """Return a field that has a flag.

    Args:
        text: Its help; the default is added, where nothing is said about it.
        more: Of ``add_argument``; ``name`` is the flag's, where it is not the field's.
    """
    text = text if "(default" in text else f"{text} (default %(default)s)".lstrip()
    more |= {"type": read, "metavar": metavar} if read else {}
    return field(metadata={"default": default, "help": text, **more})


def count(default: int | None, text: str, least: int = 1) -> Any:  # noqa: ANN401
    """Return a field with a flag that is an integer."""
    return flag(default, text, at_least(least), "N")


def switch(default: bool | None, text: str) -> Any:  # noqa: ANN401
    """Return a field with a flag and its ``--no-`` counterpart."""
    text = text if "(default" in text else f"{text} (default: %(default)s)"
    return flag(default, text, action=argparse.BooleanOptionalAction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of every benchmark."""

    rounds: int = count(None, "timed")
    warm_ups: int = count(1, "rounds run first and thrown away", least=0)
    shape: str = flag(
        "0.9b",
        "language model: 0.9b (2048 wide, 17 layers), 7b (LLaVA-1.5-7B: 4096, 32), 0.2b (4 "
        "layers, and a quarter of the tower's), qwen3-vl-2b (2048, 28, 8 KV heads), tiny (to try "
        "the command: its times mean nothing)",
        choices=SIZES,
    )
    dtype: str = flag("bfloat16", "number format", choices=_ELEMENT_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(Options):
    """Of a benchmark that asks engines, one request at a time."""

    family: str = flag(
        "llava",
        "llava (LLaVA-1.5: 576 tokens a picture), llava-next (an overview, 4 tiles: 2,928), "
        "internvl (4 tiles, a thumbnail: 1,280), qwen3-vl (1024 x 1024 pixels: 1,024)",
        choices=FAMILIES,
    )
    side: int | None = count(
        None, "pixels of a picture's side, where a family takes any (default: the family's)"
    )
    rates: list[float] = flag(None, "pruning rates", numbers(float, 0, 1), "R,R")
    text_tokens: int = count(512, "prompt of the text-only requests")
    decode_tokens: int = count(16, "tokens decoded after the first")
    kv_bytes: int = flag(
        None,
        "KV cache of each engine, MiB (default: room for three requests)",
        lambda text: at_least(1)(text) << 20,
        "N",
        name="--kv-mib",
    )
    eager: bool = switch(None, f"{_EAGER} (default: on a CPU, not on a GPU)")
    context: int = 0
    """Tokens of a request, of a step, and half of what the cache must hold; ``_with_room`` sets
    it, and the cache's bytes where none are given."""
    era: Mapping[str, object]

    @property
    def size(self) -> LlamaSize:
        """The shape, as the family has it."""
        return size_of(self.shape, self.family)

    @property
    def asked(self) -> DummyFamily:
        """What is asked of the family."""
        known = FAMILIES[self.family]
        return known if self.side is None else known.of_side(self.side)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions(EngineOptions):
    """Of the attention layer."""

    eager: bool = switch(True, _EAGER)
    mirror: bool = switch(True, "start each engine twice, in mirrored order")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions(EngineOptions):
    """Of requests against stock vLLM."""

    profile: bool = switch(True, "one more pruned request under torch.profiler")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReducerOptions(Options):
    """Of the pruning step."""

    policies: list[str] = flag("era,dpp", _POLICIES, _SPLIT, "P,P")
    sizes: list[tuple[int, int, int]] = flag(
        "576:64,5x576:32,2880:160,16x1024:102,16384:1638", "", sizes, "SxN:K,N:K"
    )
    n_sweep: list[int] = flag(
        "256,576,1024,2304,4096", f"at K = {FIXED_K}; {_FIT}", numbers(int, FIXED_K + 1), "N,N"
    )
    k_sweep: list[int] = flag(
        "16,32,64,128,256,512", f"at N = {FIXED_N}; {_FIT}", numbers(int, 1, FIXED_N), "K,K"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentsOptions(Options):
    """Of blocks of a large picture."""

    policies: list[str] = flag("era,dpp", _POLICIES, _SPLIT, "P,P")
    tokens: list[int] = flag("4096,16384", "of a picture, squares", squares, "N,N")
    segments: list[int] = flag(
        "1024,2048,4096",
        "tokens of a block, at most (default %(default)s; whole is always there)",
        numbers(int, 16),
        "N,N",
    )
    rate: float = flag(0.944, "of noise and photos", one_rate, "R")
    answer_rate: float = flag(0.889, "of the questions", one_rate, "R")
    patches: int = count(16384, "of the tower that the reducer is held against; 4 a token", 64)
    tower_layers: int = count(1, "timed, and multiplied")
    slow_s: float = flag(30.0, "what takes so long is timed once", float, "S")
    photos: int = count(3, "the held out ones first")
    pictures: int = count(150, "asked about, 4 questions each")


@dataclass(frozen=True, slots=True, kw_only=True)
class GapOptions(Options):
    """Of a stream's pauses."""

    pictures: int = count(64, "that arrive at once")
    step_tokens: int = count(2048, "vLLM's --max-num-batched-tokens, which is also its encoder's")
    kv_mib: int = count(1024, "KV cache of each engine, MiB")
    rate: float = flag(0.889, "pruning rate (default .889)", one_rate, "R")
    eager: bool = switch(None, f"{_EAGER} (default: on a CPU, not on a GPU)")
    era: Mapping[str, object]
    family: ClassVar[str] = "llava"
    side: ClassVar[None] = None
    size, asked = EngineOptions.size, EngineOptions.asked

    @property
    def kv_bytes(self) -> int:
        """Of each engine's cache."""
        return self.kv_mib << 20

    @property
    def context(self) -> int:
        """Of the stream, which has a token a step."""
        return min(self.asked.context, 1024 + 2 * self.pictures)


def add_flags(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Add the flags of a benchmark."""
    for one in fields(kind):
        about = dict(one.metadata)
        if about:
            name = about.pop("name", "") or f"--{one.name.replace('_', '-')}"
            parser.add_argument(name, dest=one.name, **about)
        if one.name == "dtype":
            text = "folder (default %(default)s)"
            parser.add_argument("--out", default="out", metavar="DIR", help=text)


def resolved(
    kind: type[Options], arguments: argparse.Namespace, era: Mapping[str, object]
) -> Options:
    """Return the options as given, and what follows from them where nothing was.

    Args:
        era: Settings of the engines; of the benchmarks that start none, nothing.

    Raises:
        ConfigError: a request that no engine takes, or a rate that it would refuse after half a
            minute.
    """
    given = {one.name: getattr(arguments, one.name) for one in fields(kind) if one.metadata}
    if "eager" in given:
        given["era"] = era
        if given["eager"] is None:
            given["eager"] = device() == "cpu"
        name, rates = ("rates", given["rates"]) if "rates" in given else ("rate", [given["rate"]])
        if max(rates) > (highest := EraConfig.parse(era).max_pruning_rate):
            raise ConfigError(
                f"--{name}: got {max(rates):g}, allowed: [0, {highest:g}] "
                "(raise --era-max-pruning-rate)"
            )
    options = kind(**given)
    return _with_room(options) if isinstance(options, EngineOptions) else options


def _with_room(options: EngineOptions) -> EngineOptions:
    """Return the options with a context for the longest request, and a cache for three."""
    side, unit = options.side, FAMILIES[options.family].unit
    if side is not None and (unit is None or side % unit):
        allowed = "no --side, its pictures have one size" if unit is None else f"times of {unit}"
        raise ConfigError(f"--side: got {side}, allowed with this --family: {allowed}")
    size, asked = options.size, options.asked
    of_picture = asked.tokens + 24  # of the question
    longest = max(options.text_tokens, of_picture) + options.decode_tokens
    context = -(-longest // 256) * 256
    if context > asked.context:
        raise ConfigError(
            f"--text-tokens + --decode-tokens: got {longest}, allowed: up to {asked.context}"
        )
    bytes_per_token = 2 * _ELEMENT_BYTES[options.dtype] * size.layers * size.kv_width
    room = 3 * context * bytes_per_token * 2  # twice: heads may be widened, blocks are whole
    kv_bytes = options.kv_bytes or max(room, 32 << 20)
    return replace(options, context=context, kv_bytes=kv_bytes)


def facts_of(options: EngineOptions | GapOptions) -> dict[str, object]:
    """Return model and device for the JSON."""
    graphs = "eager" if options.eager else "compiled"
    height, width = options.asked.picture
    shown = f", {height} x {width} pixels" if options.asked.unit else ""
    model = f"{named(options.size, options.family)}{shown}, {options.dtype}, {graphs}"
    return {"model": model, "device": device()}
