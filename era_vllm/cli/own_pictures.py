"""Pictures of the user's and what is asked about them, read from a folder and a file.

Leaves out asking (``recommend.py``).
"""

import hashlib
import io
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from era_vllm.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from era_vllm.lab.media import Medium
    from era_vllm.lab.recommendation import Shown

_ENDINGS: Final = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
_AS_THEY_ARE: Final = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def read(
    folder: Path, prompts: Path | None, kind: str, count: int, *, least: int = 2
) -> "list[Shown]":
    """Read pictures and what is asked about them; say which files cannot be read, and go on.

    Args:
        folder: Of picture files.
        prompts: A file of questions; None: those of the kind.
        kind: Of ``PROMPTS``.
        count: Pictures at most, evenly spaced in the folder.
        least: Pictures at least.

    Raises:
        ConfigError: fewer pictures can be read, or a file of prompts that cannot be.
    """
    from era_vllm.lab.recommendation import PROMPTS, Prompt, Shown

    if not folder.is_dir():
        raise ConfigError(f"PICTURES: got {str(folder)!r}, needed a folder of pictures")
    try:
        files = sorted(
            file for file in folder.iterdir() if file.suffix.lower() in _ENDINGS and file.is_file()
        )
    except OSError as error:
        raise ConfigError(
            f"PICTURES: {str(folder)!r}: {error.strerror}; make it readable"
        ) from error
    common, own = _prompts(prompts, {file.name for file in files})
    if own:
        files = [file for file in files if file.name in own]
    common = common or PROMPTS[kind]
    step = max(1.0, len(files) / count)
    files = [files[int(step * at)] for at in range(min(count, len(files)))]
    found: list[Shown] = []
    for file in files:
        try:
            media = (_medium(file),)
        except ConfigError as error:
            print(f"era-vllm: left out: {error}", file=sys.stderr)
            continue
        asked = tuple(map(Prompt, own.get(file.name, common)))
        found.append(Shown(file.name, media, asked))
    if len(found) < least:
        raise ConfigError(
            f"PICTURES: {str(folder)!r} has {len(found)} pictures that can be asked about, needed "
            f"{least} or more (fifty say something) that end in {', '.join(sorted(_ENDINGS))}"
        )
    return found


def open_pictures(
    folder: Path | None, prompts: Path | None, count: int, seed: int
) -> "Iterator[tuple[Image.Image, Sequence[str]]]":
    """Yield a folder's pictures with questions; or, of none, generated ones with theirs.

    Raises:
        ConfigError: no folder, no picture in it, or a bad file of prompts.
    """
    if folder is None:
        from era_vllm.lab.synth.dataset import generate

        for example in generate(count, seed):
            yield example.image, [question.text for question in example.questions]
        return
    from PIL import Image

    from era_vllm.pictures import shown

    for picture in read(folder, prompts, "photo", count, least=1):
        (medium,) = picture.media
        with Image.open(io.BytesIO(medium.data)) as opened:
            yield shown(opened)[0], [question.text for question in picture.questions]


def _medium(file: Path) -> "Medium":
    """Return a picture's file as it is, or as PNG where few servers read its format."""
    from PIL import Image

    from era_vllm.cli.loading import open_image
    from era_vllm.lab.media import Medium, png

    picture = open_image(file)
    with Image.open(file) as opened:
        mime = _AS_THEY_ARE.get(opened.format or "")
    return Medium("image", file.read_bytes(), mime) if mime else png(picture)


def _prompts(
    path: Path | None, names: Collection[str]
) -> tuple[Sequence[str], dict[str, list[str]]]:
    """Return what is asked about every picture, and what about one.

    Raises:
        ConfigError: no such file, no question in it, or one about a picture that is not there.
    """
    if path is None:
        return (), {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"PROMPTS: {str(path)!r} cannot be read ({error}); needed a text file in UTF-8"
        ) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise ConfigError(f"PROMPTS: {str(path)!r} is empty, needed a question a line")
    if path.suffix.lower() not in (".jsonl", ".json"):
        return [line for _, line in lines], {}
    own: dict[str, list[str]] = {}
    for number, line in lines:
        try:
            row = json.loads(line)
            picture, question = row["picture"], row["question"]
            if not (isinstance(picture, str) and isinstance(question, str) and question.strip()):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'PROMPTS: line {number} of {str(path)!r}: needed {{"picture": "a.png", '
                '"question": "..."}'
            ) from error
        if picture not in names:
            raise ConfigError(
                f"PROMPTS: line {number} of {str(path)!r}: got picture {picture!r}, which is no "
                "picture file of the folder; name it as it is there"
            )
        own.setdefault(picture, []).append(question)
    return (), own


def fingerprint(subjects: "Sequence[Shown]") -> str:
    """Return a hash of the pictures and of what is asked about them."""
    asked = hashlib.sha256()
    for subject in subjects:
        texts = [subject.name, *(question.text for question in subject.questions)]
        for part in (json.dumps(texts).encode(), *(medium.data for medium in subject.media)):
            asked.update(hashlib.sha256(part).digest())
    return asked.hexdigest()
