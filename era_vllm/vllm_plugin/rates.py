"""Each image's effective pruning rate: where it comes from and what is refused. No vllm import.

A prompt carries its rates as ``mm_processor_kwargs["era"]``: one number for all of its images or a
list with one a picture. Absent = the server's default.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Final

from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError

KEY: Final = "era"
_NEAR: Final = 0.85  # so that EVS's video_pruning_rate is another name


def effective_rates(
    processor_kwargs: Mapping[str, object], images: int, config: EraConfig
) -> list[float]:
    """Return one rate an image.

    Raises:
        ConfigError: not a number or a list of them, out of range, not as many rates as images, or
            a key that looks like a misspelt one.
    """
    refuse_misspelt(processor_kwargs)
    asked = processor_kwargs.get(KEY)
    if asked is None:
        return [config.pruning_rate] * images
    rates = list(asked) if isinstance(asked, list | tuple) else [asked] * images
    if len(rates) != images:
        raise ConfigError(
            f"{KEY}: got {len(rates)} pruning rates for {images} images, needed one an image or a "
            "single number for all"
        )
    return [config.check_rate(rate) for rate in rates]


def refuse_misspelt(names: Iterable[str]) -> None:
    """Check that no argument looks like ours and would be ignored.

    Raises:
        ConfigError: one starts with our key, in small or capital letters, or is the setting's name.
    """
    for name in names:
        small = name.lower().replace("-", "_")
        near = difflib.get_close_matches(small, ["pruning_rate"], cutoff=_NEAR)
        if name != KEY and (near or small.startswith(KEY)):
            raise ConfigError(
                f"mm_processor_kwargs: got {name!r}, needed {KEY!r}: one pruning rate for all "
                "images of a prompt or a list with one an image"
            )


def without_rates(processor_kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments that are the Hugging Face processor's own."""
    return {name: value for name, value in processor_kwargs.items() if name != KEY}
