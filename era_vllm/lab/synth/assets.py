"""What pictures are made of: background photos, handwritten digits, masks of shapes and words.

First step of the generator (assets -> scene -> render -> questions). Photos and digits come out of
files that scikit-image and scikit-learn install; nothing is downloaded. Leaves out where things
are (`scene.py`).
"""

import math
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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

ShapeKind = Literal["circle", "square", "triangle", "star", "cross", "diamond", "ring"]

SHAPES: Final[tuple[ShapeKind, ...]] = get_args(ShapeKind)
FONT_SIZES: Final = range(15, 19)
SIGN_SIZES: Final = range(10, 13)
"""Font sizes of small signs."""

# Room that a word takes at each font size, as Pillow 13 measures it. Written down, because other
# releases differ by a pixel, and every later lot of a picture depends on it.
_WORD_SIZES: Final[dict[str, tuple[tuple[int, int], ...]]] = {
    "cat": ((29, 18), (32, 19), (32, 19), (35, 20)),
    "dog": ((35, 22), (38, 23), (41, 23), (41, 25)),
    "sun": ((31, 16), (34, 17), (36, 17), (37, 18)),
    "bus": ((32, 19), (35, 20), (36, 20), (38, 21)),
    "cup": ((33, 19), (36, 20), (37, 20), (39, 22)),
    "hat": ((29, 19), (32, 20), (33, 20), (35, 21)),
    "key": ((32, 22), (34, 23), (36, 23), (37, 25)),
    "map": ((38, 19), (41, 20), (42, 20), (44, 22)),
    "pen": ((33, 19), (36, 20), (38, 20), (39, 22)),
    "box": ((34, 19), (36, 20), (37, 20), (39, 21)),
    "fish": ((31, 19), (35, 21), (36, 21), (38, 22)),
    "bird": ((34, 19), (37, 20), (38, 20), (40, 22)),
    "tree": ((34, 18), (37, 19), (39, 19), (41, 20)),
    "moon": ((47, 16), (51, 17), (55, 17), (55, 18)),
    "milk": ((35, 19), (39, 20), (40, 20), (41, 22)),
    "stop": ((38, 21), (42, 22), (43, 22), (46, 24)),
    "exit": ((31, 19), (35, 20), (36, 20), (38, 22)),
    "open": ((42, 19), (46, 20), (49, 20), (50, 22)),
    "sale": ((34, 19), (38, 20), (39, 20), (41, 21)),
    "taxi": ((31, 19), (35, 20), (35, 20), (38, 22)),
    "cafe": ((36, 19), (41, 21), (42, 21), (45, 22)),
    "bank": ((41, 19), (45, 20), (46, 20), (49, 21)),
    "shop": ((41, 22), (45, 23), (47, 23), (49, 25)),
    "park": ((38, 22), (41, 23), (41, 23), (45, 25)),
}
WORDS: Final = tuple(_WORD_SIZES)
TURNS: Final = 4  # how many slightly different tilts a shape comes in

_OVERSAMPLING: Final = 4
_TILT: Final = 0.12  # radians between two turns
_RING_WIDTH: Final = 0.27  # of the diameter
_AROUND: Final[dict[ShapeKind, tuple[float, ...]]] = {
    "square": (math.pi / 4, 1.0, 1.0, 1.0, 1.0),
    "triangle": (-math.pi / 2, 1.0, 1.0, 1.0),
    "star": (-math.pi / 2, *(1.0, 0.42) * 5),
}
"""The angle of the first corner, and how far each is from the middle."""
_WORD_MARGIN: Final = 4
_SIGN_MARGIN: Final = 2

Point = tuple[float, float]


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
    files = _photo_files(split) if backgrounds is None else _folder_files(Path(backgrounds))
    return Material({file.name: _load_photo(file) for file in files}, _load_digits(split))


def _photo_files(split: Split) -> Sequence[Path]:
    files: list[Path] = []
    for photo in _PHOTOS[split]:
        package, _, name = photo.partition("/")
        with suppress(ModuleNotFoundError):
            files.append(Path(str(resources.files(package).joinpath(name))))
        if not files or files[-1].name != name or not files[-1].is_file():
            raise ConfigError(
                f"background photo {name} comes with {package!r}, which is not installed or holds "
                f"it no longer; run {_LAB_EXTRA}, or name a folder of photos (backgrounds)"
            )
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


def with_bent_digits(material: Material, copies: int = 7) -> Material:
    """Return material with bent copies of each digit: turned, sheared, larger or smaller.

    There are few hands to learn from. The same material gives the same copies.
    """
    lots = random.Random("bent digits")
    digits = tuple(
        tuple(
            each for mask in masks for each in (mask, *(_bent(mask, lots) for _ in range(copies)))
        )
        for masks in material.digits
    )
    return Material(material.photos, digits)


def _bent(mask: Image.Image, lots: random.Random) -> Image.Image:
    turn, shear, size = lots.uniform(-0.22, 0.22), lots.uniform(-0.2, 0.2), lots.uniform(0.88, 1.2)
    wide = size * lots.uniform(0.9, 1.1)
    a, b = wide * math.cos(turn), wide * (math.sin(turn) + shear)
    d, e = -size * math.sin(turn), size * math.cos(turn)
    middle = (DIGIT_SIZE - 1) / 2
    c = middle - a * (middle + lots.uniform(-1, 1)) - b * middle
    f = middle - d * middle - e * (middle + lots.uniform(-1, 1))
    return mask.transform(
        mask.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC
    )


@cache
def shape_mask(kind: ShapeKind, size: int, turn: int) -> Image.Image:
    """Draw one shape as an antialiased mask.

    Args:    size: side in pixels.   turn: 0..3, the tilt; only square, triangle and star show it.
    Returns: an "L" image, size x size, 255 inside. Shared: do not draw on it.
    """
    side = size * _OVERSAMPLING
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if kind in ("circle", "ring"):
        draw.ellipse([1, 1, side - 2, side - 2], fill=255)
    if kind == "ring":
        hole = side * _RING_WIDTH
        draw.ellipse([hole, hole, side - hole, side - hole], fill=0)
    if kind not in ("circle", "ring"):
        center, radius = side / 2, side / 2 - 1
        outline = _outline(kind, (turn - (TURNS - 1) / 2) * _TILT)
        draw.polygon([(center + radius * x, center + radius * y) for x, y in outline], fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


def _outline(kind: ShapeKind, tilt: float) -> list[Point]:
    """Corners of a shape in the unit circle, y downwards."""
    if kind in _AROUND:
        start, *radii = _AROUND[kind]
        angles = (start + tilt + at * 2 * math.pi / len(radii) for at in range(len(radii)))
        around = zip(radii, angles, strict=True)
        return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in around]
    if kind == "diamond":
        return [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)]
    arm = 0.32  # half the width of an arm of the cross
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    corners: list[Point] = []
    for _ in range(4):  # clockwise, a quarter turn each
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


@cache
def word_mask(text: str, font_size: int) -> Image.Image:
    """Draw one word in Pillow's own font; a small sign's is as large as Pillow measures it.

    Args:    text: one of WORDS.   font_size: one of FONT_SIZES or SIGN_SIZES.
    Returns: an "L" image, 255 inside. Shared: do not draw on it.
    """
    font = ImageFont.load_default(font_size)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    if font_size in FONT_SIZES:
        margin, (width, height) = _WORD_MARGIN, _WORD_SIZES[text][FONT_SIZES.index(font_size)]
    else:
        margin = _SIGN_MARGIN
        width, height = right - left + 2 * margin, bottom - top + 2 * margin
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).text((margin - left, height - margin - bottom), text, font=font, fill=255)
    return mask
