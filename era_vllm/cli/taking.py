"""What stands for pictures in plain transformers, where an engine has to prune them.

Of LLaVA-1.5 plain transformers prunes by itself (``lab/oracle.py``); of other families an engine in
this process does, and ends. Shared by ``calibrate`` and ``ecl``; leaves out both.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count as numbers
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from tqdm import tqdm

from era_vllm.errors import ConfigError

if TYPE_CHECKING:
    from era_vllm.bench.taken import Taken
    from era_vllm.lab.asking import Subject
    from era_vllm.lab.synth.tasks import Kind

T = TypeVar("T")
_CONTEXT: Final = 8192
"""Of the engine's at most; a prompt with its pictures unpruned has to fit."""


def prunes_alone(model: str) -> bool:
    """Tell whether plain transformers prunes a model's pictures.

    Raises:
        ConfigError: too little memory for it; engine and oracle are there one after the other.
        UnsupportedError: a family that is not served, or that transformers does not have.
    """
    import torch

    from era_vllm.cli.loading import LLAVA, architectures, lacking_memory, model_config

    if lacking := lacking_memory(model, torch.float32):
        raise ConfigError(f"MODEL {model!r}: {lacking}; run it where there is more")
    return architectures(model_config(model)) == [LLAVA]


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
    from era_vllm.lab.synth.tasks import draw_task
    from era_vllm.vllm_plugin.families import FAMILIES

    if pictures is not None:
        return read(pictures, prompts, "photo", count)
    kinds: Sequence[Kind] = ("standard",)
    if any("video" in FAMILIES[name].modalities for name in architectures(model_config(model))):
        kinds = ("picture", "several", "film") if films else ("picture",)
    material = load_material(split="train")
    drawn = (draw_task(kinds[n % len(kinds)], seed, n, material) for n in numbers())
    return list(islice((task for task in drawn if task.questions), count))


def taken_of(
    model: str,
    settings: Mapping[str, object],
    asked: "Sequence[Subject]",
    title: str,
    read: "Callable[[Taken, int, Subject], T]",
) -> Iterator[T]:
    """Start an engine, float32, and yield what is read of it about each subject, with its number.

    With a progress bar; subjects that it does not take are named on standard error, and left out.
    """
    from era_vllm.bench.setup import started
    from era_vllm.cli.loading import auto_config
    from era_vllm.lab.screen import bar

    text = auto_config(model).get_text_config()
    context = min(_CONTEXT, text.max_position_embeddings)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = 8 * text.num_hidden_layers * text.num_key_value_heads * width
    kv_bytes = (64 << 20) + 2 * context * token_bytes  # twice: a head is widened for its bias
    more = {"dtype": "float32", "enable_prefix_caching": False}
    more |= {"context": context, "kv_bytes": kv_bytes}
    with started(", which prunes", model, settings, **more) as llm:
        from era_vllm.bench.taken import Taken

        with Taken(llm) as taken, bar(len(asked), title, "picture") as shown:
            for number, subject in enumerate(asked):
                try:
                    yield read(taken, number, subject)
                except ConfigError as error:
                    name = getattr(subject, "name", "a picture")
                    tqdm.write(f"era-vllm: left out: {name}: {error}", sys.stderr)
                shown.update()
