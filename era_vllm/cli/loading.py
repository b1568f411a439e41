"""What the user names, opened: an image file, and a checkpoint for the oracle. No vLLM needed.

Decoders and hubs have their own error texts, long or leaking; these are replaced by one line.
"""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

from PIL import Image, ImageOps

from era_vllm.cli.options import DEFAULT_MODEL, DEFAULT_NAME
from era_vllm.errors import ConfigError
from era_vllm.vllm_plugin.families import era_architecture

if TYPE_CHECKING:
    from era_vllm.lab.oracle import Oracle


def open_image(path: Path) -> Image.Image:
    """Read a picture as vLLM does: turned as its EXIF says, transparent parts on white, RGB.

    Raises:
        ConfigError: no such file, not a picture, or a damaged or far too large one.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"image {str(path)!r} {what}; needed a picture file (PNG, JPEG, WebP)")
    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            turned = ImageOps.exif_transpose(opened)
            if not turned.has_transparency_data:
                return turned.convert("RGB")
            layer = turned.convert("RGBA")
            white = Image.new("RGBA", layer.size, "white")
            return Image.alpha_composite(white, layer).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ConfigError(
            f"image {str(path)!r} has more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ConfigError(
            f"image {str(path)!r} is not a picture in a format that Pillow knows; needed PNG, "
            "JPEG, WebP, GIF, BMP or TIFF"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's decoders raise
        raise ConfigError(
            f"image {str(path)!r} cannot be decoded: the file is damaged or cut off, or may not "
            "be read; save it anew and try again"
        ) from error


def model_config(model: str) -> dict[str, object]:
    """Return a checkpoint's config.json.

    Raises:
        ConfigError: no such checkpoint.
    """
    from transformers import PretrainedConfig

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    try:
        found, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError) as error:
        raise ConfigError(_no_model(model)) from error
    if not found:
        raise ConfigError(_no_model(model))
    return found


def architectures(config: dict[str, object]) -> list[str]:
    """Return the architecture names of a config.json."""
    return list(cast(list[str] | None, config.get("architectures")) or [])


def open_oracle(model: str) -> "Oracle":
    """Load a checkpoint in plain transformers, float32.

    Raises:
        ConfigError: no such checkpoint, or one that lacks files.
        UnsupportedError: a family that is not served.
    """
    era_architecture(architectures(model_config(model)))
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from era_vllm.lab.oracle import Oracle

    set_verbosity_error()
    disable_progress_bar()
    try:
        return Oracle(model)
    except OSError as error:
        raise ConfigError(
            f"model {model!r}: the checkpoint lacks weights, processor or tokenizer; needed a "
            "complete one, as save_pretrained writes it"
        ) from error


def display_name(model: str) -> str:
    """Return how a model is named in texts."""
    return f"{DEFAULT_NAME} (ships with era_vllm)" if model == DEFAULT_MODEL else model


def _no_model(model: str) -> str:
    return (
        f"model {model!r}: no config.json could be read; needed a folder with a Hugging Face "
        "checkpoint, or the name of one that can be downloaded from here"
    )
