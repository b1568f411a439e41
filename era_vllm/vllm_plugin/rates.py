"""Each image's effective pruning rate: where it comes from and what is refused. No vllm import.

A prompt carries its rates as ``mm_processor_kwargs["era"]``: one number for all of its images or a
list with one a picture. Absent = the server's default.
"""

from collections.abc import Mapping
from typing import Final

from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError

KEY: Final = "era"


def effective_rates(
    processor_kwargs: Mapping[str, object], images: int, config: EraConfig
) -> list[float]:
    """Return one rate an image.

    Raises:
        ConfigError: not a number or a list of them, out of range, or as many rates as no images.
    """
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


def without_rates(processor_kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments that are the Hugging Face processor's own."""
    return {name: value for name, value in processor_kwargs.items() if name != KEY}
