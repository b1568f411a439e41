"""What the user names, opened: an image file, and a checkpoint for the oracle. No vLLM needed.

Decoders and hubs have their own error texts, long or leaking; these are replaced by one line.
"""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final

from PIL import Image

from era_vllm.bench.provenance import free_memory
from era_vllm.errors import ConfigError, UnsupportedError
from era_vllm.pictures import RefusedError, shown
from era_vllm.vllm_plugin.families import era_architecture
from era_vllm.vllm_plugin.launch import architectures
from era_vllm.vllm_plugin.launch import model_config as read_config

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from era_vllm.lab.oracle import LanguageOracle, Oracle

LLAVA: Final = "LlavaForConditionalGeneration"
"""The family whose tower runs, and is pruned, in plain transformers."""
_OVERHEAD_BYTES: Final = 2 << 30  # activations, KV cache, the libraries themselves


def open_image(path: Path) -> Image.Image:
    """Read a picture as the server does: upright, of 8 bits, transparent parts on white, RGB.

    Raises:
        ConfigError: no such file, not a picture, or a damaged or far too large one.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"image {str(path)!r} {what}; needed a picture file (PNG, JPEG, WebP)")
    try:
        with warnings.catch_warnings(), Image.open(path) as opened:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened.load()
            return shown(opened)[0]
    except RefusedError as error:
        raise ConfigError(f"image {str(path)!r} cannot be shown: {error}") from error
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
    """Return a checkpoint's config.json; the hub keeps quiet.

    Raises:
        ConfigError: no such checkpoint.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    return read_config(model)


def open_oracle(
    model: str, dtype: "torch.dtype | None" = None, *, language: bool = True
) -> "Oracle":
    """Load a checkpoint in plain transformers.

    Args:
        model: Checkpoint folder or name.
        dtype: None = float32.
        language: False leaves the language model's layers out, for who only prunes.

    Raises:
        ConfigError: no such checkpoint, or one that lacks files.
        UnsupportedError: a family that is not served.
    """
    import torch

    if architectures(model_config(model)) != [LLAVA]:
        raise UnsupportedError(
            f"model {model!r}: got {', '.join(architectures(model_config(model)))}, allowed here: "
            f"{LLAVA}, whose tower runs in plain transformers; of other families a server draws "
            "what is kept (POST /v1/era/inspect)"
        )
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from era_vllm.lab.oracle import Oracle

    set_verbosity_error()
    disable_progress_bar()
    try:
        return Oracle(model, dtype or torch.float32, language=language)
    except OSError as error:
        raise ConfigError(
            f"model {model!r}: the checkpoint lacks weights, processor or tokenizer; needed a "
            "complete one, as save_pretrained writes it"
        ) from error


def open_language_oracle(model: str) -> "LanguageOracle":
    """Load any family's checkpoint in plain transformers, float32, with its tower where known.

    Raises:
        ConfigError: no such checkpoint, or one that lacks files.
        UnsupportedError: a family that is not served, or that transformers does not have.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from era_vllm.lab.oracle import LanguageOracle

    names = architectures(model_config(model))
    era_architecture(names)
    if names == [LLAVA]:
        return open_oracle(model)
    set_verbosity_error()
    disable_progress_bar()
    known = auto_config(model)
    from transformers import AutoModelForImageTextToText

    oracle = LanguageOracle()
    oracle.model = AutoModelForImageTextToText.from_pretrained(
        model, config=known, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    oracle.dtype = torch.float32
    return oracle


def auto_config(model: str) -> "PretrainedConfig":
    """Return a checkpoint's config as transformers has it.

    Raises:
        UnsupportedError: transformers has no such family.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except ValueError as error:
        names = ", ".join(architectures(model_config(model)))
        raise UnsupportedError(
            f"model {model!r}: got {names}, which transformers does not have without code of the "
            "checkpoint's own; there is no plain model to run it in"
        ) from error


def served_dtype(model: str) -> "torch.dtype":
    """Return the number format that vLLM serves a checkpoint in, where nothing else is said.

    The config's own, and bf16 for float32 (vllm/config/model.py, ``_resolve_auto_dtype``).
    """
    import torch

    config = model_config(model)
    parts = [config, *(config.get(part) or {} for part in ("text_config", "vision_config"))]
    names = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    found = next((name for name in names if name), "float32")
    return torch.float16 if found == "float16" else torch.bfloat16


def lacking_memory(
    model: str, dtype: "torch.dtype", copies: int = 1, *, language: bool = True
) -> str:
    """Say what is missing in main memory for copies of a model; empty if nothing is.

    Args:
        dtype: What the weights are loaded as.
        copies: How many there will be at once.
        language: Whether the language model's layers are loaded too.

    Raises:
        ConfigError: no such checkpoint.
        UnsupportedError: a family that is not served.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    era_architecture(architectures(model_config(model)))
    config = auto_config(model)
    if not language:
        config.get_text_config().num_hidden_layers = 0
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config)
    size = dtype.itemsize * sum(parameter.numel() for parameter in empty.parameters())
    needed, free = copies * size + _OVERHEAD_BYTES, free_memory()
    if free is None or needed <= free:
        return ""
    times = f"{copies} times " if copies > 1 else ""
    return (
        f"about {needed / 1e9:.0f} GB are needed (the model as {str(dtype).removeprefix('torch.')} "
        f"{times}in main memory), {free / 1e9:.0f} GB are free"
    )
