"""Pictures and prompts that no cache has seen: noise, new each time, the same in every run."""

from collections.abc import Iterator
from typing import Final

import numpy as np
from PIL import Image

from era_vllm.lab.asking import prompt_of

QUESTION: Final = "what color is the circle?"
_WORDS: Final = (8, 80)  # token ids of plain words in the sample's tokenizer


def noise_pictures(height: int, width: int | None = None, seed: int = 0) -> Iterator[Image.Image]:
    """Yield pictures of height x width pixels without end; width None = height."""
    noise, size = np.random.default_rng(seed), (height, height if width is None else width, 3)
    while True:
        yield Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8))


def word_prompts(length: int, seed: int = 0) -> Iterator[list[int]]:
    """Yield lists of token ids, text only, without end."""
    noise = np.random.default_rng(seed)
    while True:
        yield noise.integers(*_WORDS, length).tolist()


def image_prompt(
    picture: Image.Image, rate: float | None, mark: str = "<image>"
) -> dict[str, object]:
    """Return what ``LLM.generate`` takes; a rate of None is for an engine that cannot prune."""
    text = prompt_of(QUESTION).replace("<image>", mark)
    prompt = {"prompt": text, "multi_modal_data": {"image": picture}}
    return prompt if rate is None else {**prompt, "mm_processor_kwargs": {"era": [rate]}}
