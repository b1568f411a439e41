"""What the benchmarks know before vLLM is imported, which reads its environment then."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from era_vllm.bench.provenance import core_count
from era_vllm.lab.dummy import FAMILIES, DummyFamily, LlamaSize, size_of
from era_vllm.lab.screen import IN_PROCESS

FIXED_K: Final = 64
"""Of the pruning step while N grows."""
FIXED_N: Final = 2304
"""Of the pruning step while K grows."""
Kind = Literal["pruned", "stock", "bound"]
"""One that prunes, each image at the rate of its prompt; vLLM as it is; ``bound.py``."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of a benchmark that runs engines, by the names that its JSON has for them."""

    rounds: int
    warm_ups: int
    shape: str
    family: str
    side: int | None
    """Pixels of a picture's; None = the family's."""
    dtype: str
    rates: list[float]
    text_tokens: int
    decode_tokens: int
    eager: bool
    kv_bytes: int
    context: int
    """Tokens of a request, of a step, and half of what the cache must hold."""
    era: Mapping[str, object]

    @property
    def size(self) -> LlamaSize:
        """The shape, as the family has it."""
        return size_of(self.shape, self.family)

    @property
    def asked(self) -> DummyFamily:
        """What is asked of the family."""
        return pictured(self.family, self.side)


def pictured(family: str, side: int | None) -> DummyFamily:
    """Return what is asked of a family, with pictures of so many pixels a side; None = its own."""
    known = FAMILIES[family]
    return known if side is None else known.of_side(side)


@dataclass(frozen=True, slots=True)
class ReducerOptions:
    """Options of the benchmark of the pruning step, by the names that its JSON has for them."""

    rounds: int
    warm_ups: int
    shape: str
    dtype: str
    policies: list[str]
    sizes: list[tuple[int, int, int]]
    """(N, K, segments)."""
    n_sweep: list[int]
    k_sweep: list[int]


@dataclass(frozen=True, slots=True)
class SegmentsOptions:
    """Options of the benchmark of blocks of a large picture, by the names of its JSON."""

    rounds: int
    warm_ups: int
    shape: str
    dtype: str
    policies: list[str]
    tokens: list[int]
    """Of a picture; squares."""
    segments: list[int]
    """``EraConfig.max_segment``; the whole picture is always beside them."""
    rate: float
    answer_rate: float
    patches: int
    """Of the tower that the reducer is held against; four make a token."""
    tower_layers: int
    """Timed of all."""
    slow_s: float
    """What takes so long is timed once."""
    photos: int
    pictures: int
    """Four questions each."""


@dataclass(frozen=True, slots=True)
class GapOptions:
    """Options of the benchmark of a stream's pauses, by the names that its JSON has for them."""

    rounds: int
    warm_ups: int
    shape: str
    dtype: str
    pictures: int
    step_tokens: int
    kv_mib: int
    rate: float
    eager: bool
    era: Mapping[str, object]


def set_environment(*, eager: bool) -> None:
    """Make engines live in this process and say little; call before vLLM is imported."""
    own = {**IN_PROCESS, "OMP_NUM_THREADS": str(core_count())}
    if eager:
        own["TORCH_COMPILE_DISABLE"] = "1"
    for name, value in own.items():
        os.environ.setdefault(name, value)


def device() -> str:
    """Return where everything runs."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def named(size: LlamaSize, family: str = "llava") -> str:
    """Describe a model without weights for a reader."""
    of = FAMILIES[family]
    tower = of.tower if size.tower_layers == 24 else f"{size.tower_layers} layers of {of.tower}"
    tiles = f", {of.tiles} tiles a picture" if of.tiles > 1 else ""
    return (
        f"{size.parameters / 1e9:.2f} B {of.language} ({size.layers} layers x {size.hidden}) "
        f"behind {tower}{tiles}, dummy weights"
    )


def prefill_flops(size: LlamaSize, tokens: int) -> float:
    """Return the operations of the language model's layers over a prompt, computed.

    Two a multiplication: every parameter once a token, and half of all pairs twice.
    """
    return 2.0 * size.parameters * tokens + 2.0 * size.layers * size.width * tokens**2


def facts_of(
    engines: Mapping[str, Mapping[str, object]], options: EngineOptions
) -> dict[str, object]:
    """Return model, device and engines for the JSON."""
    graphs = "eager" if options.eager else "compiled"
    height, width = options.asked.picture
    shown = f", {height} x {width} pixels" if options.asked.unit else ""
    model = f"{named(options.size, options.family)}{shown}, {options.dtype}, {graphs}"
    return {"model": model, "device": device(), "engines": engines}
