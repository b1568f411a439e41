"""What the benchmarks know before vLLM is imported, which reads its environment then."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

import era_vllm
from era_vllm.bench.provenance import core_count
from era_vllm.lab.dummy import FAMILIES, LlamaSize
from era_vllm.lab.screen import IN_PROCESS, muted, progress

if TYPE_CHECKING:
    from vllm import LLM

FIXED_K: Final = 64
"""Of the pruning step while N grows."""
FIXED_N: Final = 2304
"""Of the pruning step while K grows."""
Kind = Literal["pruned", "stock", "bound", "unbounded"]
"""One that prunes, each image at the rate of its prompt; vLLM as it is; ``bound.py``; one that
prunes, scheduled as vLLM would (``gap_engines.py``)."""


def set_environment(*, eager: bool) -> None:
    """Make engines live in this process and say little; call before vLLM is imported."""
    own = {**IN_PROCESS, "OMP_NUM_THREADS": str(core_count())}
    if eager:
        own["TORCH_COMPILE_DISABLE"] = "1"
    for name, value in own.items():
        os.environ.setdefault(name, value)


@contextmanager
def started(
    what: str, model: str, settings: Mapping[str, object], **arguments: Any
) -> "Iterator[LLM]":  # noqa: ANN401
    """Import vLLM and start an engine, eager, which takes any number of pictures and videos.

    Args:
        what: Is said of it to who waits.
        settings: Of ``EraConfig``.
        arguments: Of ``engines.engine``.
    """
    set_environment(eager=True)
    progress(f"starting an engine{what}")
    with muted():
        from era_vllm.bench.engines import engine

    own = era_vllm.engine_args(model, **settings)
    with engine({"limit_mm_per_prompt": {}, **own}, **arguments) as llm:
        yield llm


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
