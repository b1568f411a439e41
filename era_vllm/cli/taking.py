"""What stands for pictures in plain transformers, where an engine has to prune them.

Of LLaVA-1.5 plain transformers prunes by itself (``lab/oracle.py``); of other families an engine in
this process does, and ends. Shared by ``calibrate`` and ``ecl``; leaves out both.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tqdm import tqdm

from era_vllm.errors import ConfigError

if TYPE_CHECKING:
    from era_vllm.bench.taken import Taken
    from era_vllm.lab.asking import Subject
    from era_vllm.lab.synth.tasks import Kind

_CONTEXT: Final = 8192
"""Of the engine's at most; a prompt with its pictures unpruned has to fit."""
_ALONE: Final = ["LlavaForConditionalGeneration"]


def prunes_alone(model: str) -> bool:
    """Tell whether plain transformers prunes a model's pictures.

    Raises:
        ConfigError: too little memory for it; engine and oracle are there one after the other.
        UnsupportedError: a family that is not served, or that transformers does not have.
    """
    import torch

    from era_vllm.cli.loading import architectures, lacking_memory, model_config

    alone = architectures(model_config(model)) == _ALONE
    if lacking := lacking_memory(model, torch.float32):
        raise ConfigError(f"MODEL {model!r}: {lacking}; run it where there is more")
    return alone


def subjects(
    model: str, pictures: Path | None, prompts: Path | None, count: int, seed: int, *, films: bool
) -> "Sequence[Subject]":
    """Return a folder's pictures with questions, or generated ones as a family takes them.

    Args:
        films: Whether videos and several pictures are generated too, where the family takes them.
    """
    from era_vllm.cli.loading import architectures, model_config
    from era_vllm.cli.own_pictures import read
    from era_vllm.lab.synth.assets import load_material
    from era_vllm.lab.synth.tasks import Task, draw_task
    from era_vllm.vllm_plugin.families import FAMILIES

    if pictures is not None:
        return read(pictures, prompts, "photo", count)
    kinds: Sequence[Kind] = ("standard",)
    if any("video" in FAMILIES[name].modalities for name in architectures(model_config(model))):
        kinds = ("picture", "several", "film") if films else ("picture",)
    material, tasks, number = load_material(split="train"), list[Task](), 0
    while len(tasks) < count:
        task = draw_task(kinds[number % len(kinds)], seed, number, material)
        tasks += [task] if task.questions else []
        number += 1
    return tasks


@contextmanager
def taking(model: str, settings: Mapping[str, object]) -> "Iterator[Taken]":
    """Start an engine, float32, and listen to what it prunes."""
    import era_vllm
    from era_vllm.bench.setup import set_environment
    from era_vllm.cli.loading import auto_config
    from era_vllm.lab.screen import muted, progress

    set_environment(eager=True)
    progress("starting an engine, which prunes")
    with muted():
        from era_vllm.bench.engines import engine
        from era_vllm.bench.taken import Taken
    more = {"dtype": "float32", "limit_mm_per_prompt": {}, "enable_prefix_caching": False}
    text = auto_config(model).get_text_config()
    context = min(_CONTEXT, text.max_position_embeddings)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = 8 * text.num_hidden_layers * text.num_key_value_heads * width
    kv_bytes = (64 << 20) + 2 * context * token_bytes  # twice: a head is widened for its bias
    arguments = era_vllm.engine_args(model, **settings)
    with engine(arguments, context=context, kv_bytes=kv_bytes, **more) as llm, Taken(llm) as taken:
        yield taken


def left_out(subject: "Subject", error: ConfigError) -> None:
    """Say which picture is left out, and why."""
    name = getattr(subject, "name", "a picture")
    tqdm.write(f"era-vllm: left out: {name}: {error}", sys.stderr)
