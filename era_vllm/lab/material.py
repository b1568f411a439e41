"""Load the real pixels that pictures are made of: background photos and handwritten digits.

First step of the generator (material -> scenes -> painting -> questions). Both come out of files
that scikit-image and scikit-learn install; nothing is downloaded. Leaves out: what is drawn on
top (`glyphs.py`) and where (`scenes.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final, Literal

import numpy as np
from PIL import Image

from era_vllm.errors import ConfigError, unknown_name

Split = Literal["train", "test"]

DIGIT_SIZE: Final = 18
_SHORT_SIDE: Final = 520
_TRAIN_DIGITS: Final = 1400  # the first of 1797; the rest are other images, mostly by other hands
_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg"})
_LAB_EXTRA: Final = "pip install 'era-vllm[lab]'"

# package/file. motorcycle_right is the other eye of motorcycle_left: held out as a photo, not as a
# place. The model card gives the accuracy on each background apart.
_PHOTOS: Final[dict[Split, tuple[str, ...]]] = {
    "train": (
        "skimage.data/astronaut.png", "skimage.data/chelsea.png", "skimage.data/rocket.jpg",
        "skimage.data/motorcycle_left.png", "skimage.data/retina.jpg", "skimage.data/ihc.png",
        "skimage.data/hubble_deep_field.jpg", "skimage.data/brick.png", "skimage.data/grass.png",
        "skimage.data/gravel.png", "skimage.data/camera.png", "skimage.data/moon.png",
        "skimage.data/coins.png", "sklearn.datasets.images/flower.jpg",
    ),
    "test": (
        "skimage.data/coffee.png", "sklearn.datasets.images/china.jpg",
        "skimage.data/motorcycle_right.png",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Material:
    """Pixels to make pictures from.

    `photos`: by file name; RGB, 520 pixels on the short side.
    `digits`: `digits[7]` holds every handwritten 7, each an 18 x 18 mask.
    """

    photos: Mapping[str, Image.Image]
    digits: tuple[tuple[Image.Image, ...], ...]


def load_material(backgrounds: Path | None = None, split: Split = "test") -> Material:
    """Load photos and digits of one split.

    Args:    backgrounds: a folder of PNG or JPEG photos; None: those of the split.
             split: "train" is what the shipped checkpoint learned from, "test" was held out.
    Returns: Material.
    Raises:  ConfigError: no such folder, no photo in it, or the lab packages are not installed.
    """
    if split not in _PHOTOS:
        raise ConfigError(unknown_name("split", split, _PHOTOS))
    photos = _photo_files(split) if backgrounds is None else _folder_files(Path(backgrounds))
    return Material(
        photos={photo.name: _load_photo(photo) for photo in photos},
        digits=_load_digits(split),
    )


def _photo_files(split: Split) -> Sequence[Path]:
    files: list[Path] = []
    for photo in _PHOTOS[split]:
        package, _, name = photo.partition("/")
        try:
            file = Path(str(resources.files(package).joinpath(name)))
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"background photo {name} comes with the package of {package!r}, which is not "
                f"installed; run {_LAB_EXTRA}, or name a folder of photos (backgrounds)"
            ) from error
        if not file.is_file():
            raise ConfigError(
                f"this version of {package!r} does not hold the background photo {name}; "
                f"run {_LAB_EXTRA}, or name a folder of photos (backgrounds)"
            )
        files.append(file)
    return files


def _folder_files(folder: Path) -> Sequence[Path]:
    if not folder.is_dir():
        raise ConfigError(
            f"backgrounds folder {str(folder)!r} does not exist; name a folder of PNG or JPEG "
            f"photos, or leave it out and {_LAB_EXTRA} to use the photos of scikit-image"
        )
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise ConfigError(
            f"backgrounds folder {str(folder)!r} holds no photo; allowed: "
            f"{', '.join(sorted(_SUFFIXES))}; or leave it out and {_LAB_EXTRA}"
        )
    return files


def _load_photo(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        photo = opened.convert("RGB")
    scale = _SHORT_SIDE / min(photo.size)
    size = (int(photo.width * scale), int(photo.height * scale))
    return photo.resize(size, Image.Resampling.BICUBIC)


def _load_digits(split: Split) -> tuple[tuple[Image.Image, ...], ...]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"handwritten digits come with scikit-learn, which is not installed; run {_LAB_EXTRA}"
        ) from error
    strokes, labels = load_digits(return_X_y=True)
    chosen = slice(0, _TRAIN_DIGITS) if split == "train" else slice(_TRAIN_DIGITS, None)
    masks: list[list[Image.Image]] = [[] for _ in range(10)]
    for stroke, label in zip(strokes[chosen], labels[chosen], strict=True):
        pixels = (stroke.reshape(8, 8) * 15.9).astype(np.uint8)  # 0..16 -> 0..254
        mask = Image.fromarray(pixels).resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC)
        masks[int(label)].append(mask)
    return tuple(tuple(each) for each in masks)
