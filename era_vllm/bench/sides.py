"""Engines of one dummy model side by side in this process.

Leaves out what they are asked (``serve.py``, ``attention.py``, ``gap.py``,
``first_token.py``).
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import era_vllm
from era_vllm.bench import bound
from era_vllm.bench.engines import TimedEngine, engine
from era_vllm.bench.gap_engines import UNBOUNDED, register_unbounded
from era_vllm.bench.options import EngineOptions, GapOptions
from era_vllm.bench.setup import Kind, named
from era_vllm.lab.dummy import FAMILIES, make_dummy
from era_vllm.lab.screen import progress
from era_vllm.vllm_plugin import families


@contextmanager
def side_by_side(
    kinds: Mapping[str, tuple[Kind, bool]],
    options: EngineOptions | GapOptions,
    more: Mapping[str, object] | None = None,
) -> Iterator[dict[str, TimedEngine]]:
    """Start engines with the same KV cache memory; stop them however it ends.

    Args:
        kinds: Name -> kind, and whether its model's heads are as wide as those of the first one,
            which prunes.
        more: Arguments of ``LLM`` of its own.
    """
    size, asked = options.size, options.asked
    count = {1: "an engine", 4: "four engines"}.get(len(kinds), f"{len(kinds)} engines")
    progress(f"starting {count}: {named(size, options.family)}")
    engines: dict[str, TimedEngine] = {}
    usual = {
        "max_num_seqs": 2,
        "limit_mm_per_prompt": {kind: int(kind == "image") for kind in asked.modalities},
        "load_format": "dummy",
        "dtype": options.dtype,
        "enforce_eager": options.eager,
        "disable_log_stats": False,
    }
    if torch.cuda.is_available():  # several share it
        usual["gpu_memory_utilization"] = 0.05
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        narrow, wide = Path(folder) / "narrow", Path(folder) / "wide"
        make_dummy(narrow, size, options.family, asked.tokens)
        for name, (kind, widened) in kinds.items():
            arguments = {
                **usual,
                **_arguments_of(kind, wide if widened else narrow, options),
                **(more or {}),
            }
            started = engine(arguments, context=options.context, kv_bytes=options.kv_bytes)
            engines[name] = TimedEngine(stack.enter_context(started))
            if not wide.exists():
                wider = replace(size, head_size=engines[name].facts()["head_size"])
                make_dummy(wide, wider, options.family, asked.tokens)
        yield engines


def _arguments_of(
    kind: Kind, folder: Path, options: EngineOptions | GapOptions
) -> Mapping[str, object]:
    """Return what ``LLM`` is given for a checkpoint folder."""
    if kind == "stock":
        return {"model": str(folder)}
    if kind != "bound":
        own = era_vllm.engine_args(str(folder), **options.era)
        if kind == "pruned":
            return own
        register_unbounded()
        return {**own, "hf_overrides": {"architectures": [UNBOUNDED]}}
    architecture = FAMILIES[options.family].architecture
    positions = "compact" if families.FAMILIES[architecture].axes == 1 else "original"
    architecture = bound.register(architecture)
    arguments = era_vllm.engine_args(str(folder), policy="uniform", positions=positions)
    return {**arguments, "hf_overrides": {"architectures": [architecture]}}
