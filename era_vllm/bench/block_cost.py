"""Time and memory of an engine's reducer on one large picture, by the bound of its blocks.

Beside it some layers of a tower that sees the picture whole, as Qwen3-VL's does, and its attention:
random weights; 2 x 2 patches are a token. Patch embedding, positions and merger are left out, so
the tower is a little faster than a real one.
"""

import ctypes
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from era_vllm.bench.clock import Cell, Samples, interleave, seconds
from era_vllm.bench.options import SegmentsOptions
from era_vllm.bench.pruning_step import Size, attention_read, random_tokens
from era_vllm.lab.dummy import SIZES
from era_vllm.lab.screen import bar
from era_vllm.layout import cut, one_grid
from era_vllm.plan import plan
from era_vllm.policies import defaults, make_policy
from era_vllm.types import OF_ENCODER, Signal
from era_vllm.vllm_plugin.encoder_pass import Encoded
from era_vllm.vllm_plugin.fields import Planned
from era_vllm.vllm_plugin.reducer import Reducer

Case = tuple[int, int, str]
"""Tokens of a picture, the bound of a block, policy."""


def named(case: Case) -> str:
    """Return a case's name; a bound that cuts nothing is the whole picture."""
    n, most, policy = case
    return f"{n} {'whole' if most >= n else most} {policy}"


def cases(options: SegmentsOptions, sizes: list[int]) -> Iterator[Case]:
    """Yield the cases of pictures of these sizes, the whole last."""
    for n in sizes:
        for most in [*(one for one in sorted(options.segments) if one < n), n]:
            for policy in options.policies:
                yield n, most, policy


def cost(options: SegmentsOptions, place: str) -> tuple[Samples, dict[str, int | None]]:
    """Return times, those of a tower among them, and the bytes that each case holds at most.

    The pass that memory is measured in is a warm-up; what took ``slow_s`` in it has no other.
    """
    width, dtype = SIZES[options.shape].hidden, getattr(torch, options.dtype)
    sizes = list(dict.fromkeys([*options.tokens, options.patches // 4]))
    cells: dict[str, Cell] = {
        named(case): prune_cell(case, options.rate, width, dtype, place)
        for case in cases(options, sizes)
    }
    memory: dict[str, int | None] = {}
    once: dict[str, Mapping[str, Sequence[float]]] = {}
    with bar(len(cells), "memory", "pass") as shown:
        for name, cell in tuple(cells.items()):
            taken: dict[str, float] = {}
            memory[name] = peak_bytes(lambda cell=cell, taken=taken: taken.update(cell()))
            if taken["prune"] >= options.slow_s:
                del cells[name]
                once[name] = {"prune": [taken["prune"]]}
            shown.update()
    cells["tower"] = tower_cell(options.patches, options.tower_layers, dtype, place)
    of_layer = 1, options.patches, QWEN3_VL.heads, QWEN3_VL.width // QWEN3_VL.heads
    read = attention_read(of_layer, dtype, place)
    cells["signal"] = lambda: {"signal": seconds(read)}
    samples = interleave(cells, options.rounds, options.warm_ups)
    return Samples({**samples.values, **once}), memory


def prune_cell(case: Case, rate: float, width: int, dtype: torch.dtype, place: str) -> Cell:
    """Return a pass of an engine's reducer over one picture of noise, cut into blocks."""
    n, most, policy = case
    config = defaults(policy, max_segment=most)
    chosen = make_policy(config)
    tokens = random_tokens(Size(n, 1), width, dtype, place, chosen.needs)
    layout = cut(one_grid(*tokens.grid, ()), most)
    wanted = chosen.needs | {Signal.ENCODER_ATTENTION}
    signals = {signal: value[0] for signal, value in tokens.signals.items() if signal in wanted}
    signals[Signal.PIXEL_HASH] = torch.arange(len(layout.segments))
    item = Encoded(Planned(plan(layout, rate, config), 0), tokens.embeds[0], signals)
    reducer = Reducer(chosen, config, None).to(place)
    return lambda: {"prune": seconds(lambda: reducer([item]))}


def shares(samples: Samples, options: SegmentsOptions) -> dict[str, float]:
    """Return the reducer's share of the tower by policy and block, what it reads included."""
    found: dict[str, float] = {}
    read = samples.ratio("signal", "tower", "signal", "tower") or 0.0
    for case in cases(options, [options.patches // 4]):
        n, most, policy = case
        reads = bool(make_policy(defaults(policy)).needs & OF_ENCODER)
        pruned = samples.ratio(named(case), "tower", "prune", "tower") or 0.0
        key = f"{policy} {'whole' if most >= n else most}"
        found[key] = pruned + (read if reads else 0.0)
    return found


@dataclass(frozen=True, slots=True)
class TowerShape:
    """Sizes of a tower."""

    width: int = 1152
    heads: int = 16
    mlp: int = 4304
    layers: int = 27


QWEN3_VL: Final = TowerShape()
"""Source: vision_config of Qwen3-VL-2B to 8B."""


def tower(shape: TowerShape, layers: int) -> SiglipEncoder:
    """Return some of its layers: SigLIP's, which have the same parts."""
    return SiglipEncoder(
        SiglipVisionConfig(
            hidden_size=shape.width,
            num_attention_heads=shape.heads,
            intermediate_size=shape.mlp,
            num_hidden_layers=layers,
            attn_implementation="sdpa",
        )
    ).eval()


def tower_cell(patches: int, timed: int, dtype: torch.dtype, device: str) -> Cell:
    """Return a pass of ``timed`` layers; ``tower`` is their time times all layers / timed."""
    layers = tower(QWEN3_VL, timed).to(device, dtype)
    x = torch.randn(1, patches, QWEN3_VL.width, device=device).to(dtype)

    def one() -> dict[str, float]:
        taken = seconds(lambda: layers(x))
        return {"timed_layers": taken, "tower": taken * QWEN3_VL.layers / timed}

    return one


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Run a call; return the most memory that it held; None where the system does not tell.

    Returns:
        On a GPU what torch's allocator handed out; else the growth of the process's resident
        memory (Linux), to a page, allocator's caches trimmed before.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        before = _status("VmRSS")
    except OSError:
        call()
        return None
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
