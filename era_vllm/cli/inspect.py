"""``era-vllm inspect``: a picture of the visual tokens that the model keeps, without an engine.

Encoder and projector alone run in plain transformers, in the server's number format; the
reduction is the core's: the same choice that the server makes, up to near-ties that the last bit of
a feature decides. Leaves out the drawing (``viz.py``).
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from era_vllm.calibration import calibrated
from era_vllm.cli.options import DEFAULT_MODEL, add_era_options, era_settings
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from era_vllm.lab.oracle import Oracle
    from era_vllm.types import PrunedTokens

DESCRIPTION = """Draw which visual tokens of an image are kept, and what each of them stands for.

  era-vllm inspect photo.png                                    128 of 576 tokens, or as many
  era-vllm inspect photo.png --pruning-rate 0.889 --out kept.png
  era-vllm inspect photo.png --model llava-hf/llava-1.5-7b-hf --era-policy dpp
"""
FORMATS: Final = (".png", ".jpg", ".jpeg", ".webp")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add, same = parser.add_argument, "the same as --era-pruning-rate"
    add("image", type=Path, metavar="IMAGE", help="a picture file")
    add("--model", default=DEFAULT_MODEL, help="checkpoint folder or name (default: the sample)")
    text = "what is asked of it, with --era-question-aware (default: nothing)"
    add("--question", metavar="TEXT", help=text)
    add("--pruning-rate", type=float, dest="era_pruning_rate", metavar="R", help=same)
    add("--out", type=Path, default=Path("kept.png"), help="where to draw (default kept.png)")
    add_era_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Draw, and say what was kept."""
    from era_vllm.cli.loading import lacking_memory, open_image, open_oracle, served_dtype
    from era_vllm.policies import make_policy
    from era_vllm.types import OF_LANGUAGE_MODEL

    config = EraConfig.parse(calibrated(arguments.model, era_settings(arguments)))
    language = bool(OF_LANGUAGE_MODEL & make_policy(config).needs) or config.scout > 0
    if arguments.question is not None and not config.question_aware:
        raise ConfigError(
            "--question: nothing is pruned for what is asked of it here; add --era-question-aware, "
            "with a policy that reads it, or leave --question out"
        )
    _check_out(arguments.out, arguments.image)
    image = open_image(arguments.image)
    dtype = served_dtype(arguments.model)
    if lacking := lacking_memory(arguments.model, dtype, language=language):
        raise ConfigError(f"--model {arguments.model!r}: {lacking}; run it where there is more")
    picture, pruned = kept_picture(
        open_oracle(arguments.model, dtype, language=language),
        image,
        config,
        arguments.question or "",
    )
    save(picture, arguments.out)
    n, kept = pruned.assignment.shape[1], pruned.anchors.shape[1]
    stood_for = pruned.log_bias[0].exp()
    print(
        f"{arguments.image.name}: kept {kept} of {n} visual tokens ({config.policy}, pruning rate "
        f"{config.pruning_rate:g}); each stands for {stood_for.min():.1f} to "
        f"{stood_for.max():.1f} tokens; drawn in {arguments.out}"
    )
    return 0


def kept_picture(
    oracle: "Oracle", image: "Image", config: EraConfig, question: str = ""
) -> "tuple[Image, PrunedTokens]":
    """Prune an image at the config's rate, for a question if it is pruned for any, and draw it."""
    from era_vllm.question import of_text, special_ids
    from era_vllm.viz import Kept, draw, seen

    tokenizer = oracle.processor.tokenizer
    asked = of_text(question, tokenizer, special_ids(tokenizer))
    pruned = oracle.reduce([image], config, config.pruning_rate, [asked])
    processor = oracle.processor.image_processor
    given = seen(oracle.pixels(image)[0], tuple(processor.image_mean), tuple(processor.image_std))
    vision = oracle.model.config.vision_config
    side = vision.image_size // vision.patch_size
    title = f"policy {config.policy}, pruning rate {config.pruning_rate:g}"
    rows = (pruned.anchors[0], pruned.assignment[0], pruned.log_bias[0])
    kept = Kept(given, (side, side), *(row.tolist() for row in rows))
    return draw([kept], title), pruned


def save(picture: "Image", path: Path) -> None:
    """Write a picture, with its folder.

    Raises:
        ConfigError: the place cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise ConfigError(
            f"--out {str(path)!r} cannot be written ({error.strerror or 'no reason given'}); "
            "name another place"
        ) from error


def _check_out(out: Path, image: Path) -> None:
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"--out: got {str(out)!r}, needed a name that ends in one of {', '.join(FORMATS)}"
        )
    if out.resolve() == image.resolve():
        raise ConfigError(f"--out: got {str(out)!r}, the image itself; name another file")
