"""What a picture may be, and how its bytes become pixels; the server runs it in processes.

A hostile picture costs what it likes once a decoder has it. Here it meets counts of its parts
first, and a cap of memory; ``era_vllm_server.decoders`` ends the process when time is up. What is
shown is what every viewer shows: 16 bits are scaled, and damage that costs no pixel is left out.
Leaves out where the bytes come from (``media``). Pillow and the standard library alone: a process
starts in no time.
"""

import json
import os
import re
import resource
import socket
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from itertools import islice
from typing import Final, NamedTuple

from PIL import AvifImagePlugin, Image, ImageChops, ImageOps

from era_vllm.decoder_process import RefusedError, connected

_MAX_ASPECT: Final = 200
"""Width by height or the other way round. Processors scale the short side up, and what they make of
30000 x 1 pixels does not fit into memory. Source: the bound of Qwen2-VL's own processor."""
_SCANS: Final = 500
"""Of a JPEG, each a pass over its pixels; cameras write one, encoders for the web ten. Source:
libjpeg-turbo's advice to those who decode what strangers send."""
_FILL: Final = 2**17
"""Bytes of FF, in pairs, in a JPEG; between two of its parts Pillow reads them one by one."""
_CHUNKS: Final = 2**14
"""Of a PNG; encoders begin one every 8 KB, and Pillow takes 30 us for each."""
_MEMORY: Final = (2**28, 24)
"""Bytes that a process may have, and more for each pixel of the largest picture: four copies of 4
bytes, and a progressive JPEG's coefficients."""
_BAND: Final = 64  # rows
_PNG, _JPEG, _JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
_NAMES: Final = {
    rb"\x89PNG": "PNG",
    rb"RIFF....WEBP": "WEBP",
    rb"....ftypavi[fs]": "AVIF",
    rb"....ftyp(hei|hev|mif|msf)": "HEIF (HEIC), which many phones write",
    rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI": "a video's",
    rb"\xff\x0a|....JXL": "JPEG XL",
    rb"%PDF": "PDF",
    rb"\s*(<\?xml[^>]*>\s*)?<svg": "SVG",
}
"""How files begin, for those that Pillow cannot open."""


class Wanted(NamedTuple):
    """What a picture may be, and what is to be made of it."""

    formats: str
    """Allowed, as the setting spells them."""
    known: tuple[str, ...]
    """Those that are tried, so that one which is not allowed has a name."""
    max_pixels: int
    mode: str | None
    """Of Pillow's; None = the picture's own."""
    background: tuple[int, int, int]
    """Behind what is transparent."""


def decode(
    data: bytes, wanted: Wanted, count: Callable[[int], object] = abs
) -> tuple[Image.Image, bool]:
    """Return a picture's pixels, and whether its mode was changed for them.

    Args:
        data: The file.
        wanted: What it may be.
        count: Is told the number of pixels before they are decoded.

    Raises:
        RefusedError: it is not allowed, or no whole picture.
    """
    _count_parts(data)
    named = (name for form, name in _NAMES.items() if re.match(form, data, re.DOTALL))
    name = next(named, "not known")
    for version in _versions(data):
        try:
            with Image.open(BytesIO(version), formats=wanted.known) as picture:  # the header only
                name = picture.format or name
                _check(name, picture.size, wanted)
                if version is data:
                    count(picture.width * picture.height)
                picture.load()
                break
        except (RefusedError, MemoryError):
            raise
        except Exception:  # decoders raise anything, struct.error and SyntaxError included
            continue
    else:
        _check(name, (1, 1), wanted)
        raise RefusedError(f"its {len(data)} bytes are no whole {name}: truncated, or damaged")
    try:
        return shown(picture, wanted.mode, wanted.background)
    except ValueError:
        raise RefusedError(f"the colours of its mode {picture.mode} cannot be shown") from None


def _count_parts(data: bytes) -> None:
    """Refuse what a decoder would go through part by part for long."""
    if data.startswith(_JPEG):
        scans, fill = data.count(b"\xff\xda"), 2 * data.count(b"\xff\xff")
        if scans > _SCANS:
            raise RefusedError(f"its JPEG has {scans} scans, allowed are {_SCANS}")
        if fill > _FILL:
            raise RefusedError(f"its JPEG has {fill} fill bytes, allowed are {_FILL}")
    elif next(islice(_chunks(data), _CHUNKS, None), None):
        raise RefusedError(f"its PNG has more chunks than the {_CHUNKS} that are allowed")


def _chunks(data: bytes) -> Iterator[memoryview]:
    """Yield a PNG's chunks; none of other files."""
    at, view = len(_PNG), memoryview(data)
    while data.startswith(_PNG) and at + 8 <= len(data):
        end = at + 12 + struct.unpack_from(">I", data, at)[0]
        yield view[at:end]
        at = end


def _check(kind: str, size: tuple[int, int], wanted: Wanted) -> None:
    (width, height), most = size, wanted.max_pixels
    if kind not in wanted.formats.upper().replace(" ", "").split(","):
        raise RefusedError(f"its format is {kind}, allowed are {wanted.formats}")
    if width * height > most:
        raise RefusedError(f"it has {width} x {height} pixels, allowed are {most} in all")
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise RefusedError(f"it has {width} x {height} pixels, allowed is 1 : {_MAX_ASPECT}")


def _versions(data: bytes) -> Iterator[bytes]:
    """Yield a file, and, should it be damaged, one without the damage if that costs no pixel."""
    yield data
    if data.startswith(_PNG):
        yield _PNG + b"".join(chunk for chunk in _chunks(data) if _is_seen(chunk))
    elif data.startswith(_JPEG) and _is_complete(data):
        yield data + _JPEG_END


def _is_seen(chunk: memoryview) -> bool:
    """Say whether a PNG's chunk changes what is seen; another may be text with a wrong checksum."""
    kind, right = bytes(chunk[4:8]), zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
    return kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and right)


def _is_complete(data: bytes) -> bool:
    """Say whether a JPEG lacks its end only: then no pixel depends on what comes behind it."""
    with suppress(Exception):
        ends = (Image.open(BytesIO(data + tail + _JPEG_END)) for tail in (b"", b"\x5a" * 64))
        return ImageChops.difference(*ends).getbbox() is None
    return False


def shown(
    picture: Image.Image,
    mode: str | None = "RGB",
    background: tuple[int, int, int] = (255, 255, 255),
) -> tuple[Image.Image, bool]:
    """Return a picture upright, of 8 bits and in a mode, as vLLM's ``ImageMediaIO`` does.

    Args:
        picture: Loaded.
        mode: Of Pillow's; None = the picture's own.
        background: Behind what is transparent.

    Returns:
        The picture, and whether its mode was changed.

    Raises:
        RefusedError: its numbers are no colours.
    """
    with suppress(Exception):  # EXIF of nonsense
        picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] in "IF":
        picture = _scaled(picture if picture.mode == "F" else picture.convert("I"))
    mode = mode or picture.mode.replace("P", "RGB")  # indices of colours are no picture
    if picture.mode == mode:
        return picture, False
    if mode != "RGB" or not picture.has_transparency_data:
        return picture.convert(mode), True
    over, under = picture.convert("RGBA"), Image.new("RGB", picture.size, tuple(background))
    under.paste(over, mask=over.getchannel("A"))
    return under, True


def _scaled(picture: Image.Image) -> Image.Image:
    """Return 16 bits, or floats of 0 to 1, as 8 bits; Pillow's own conversion clips them."""
    (low, high), top = picture.getextrema(), 1 if picture.mode == "F" else 65535
    if not 0 <= low <= high <= top:
        raise RefusedError(f"its pixels are numbers from {low} to {high}, allowed is 0 to {top}")
    return picture.convert("F").point(lambda value: value * (255 / top) + 0.5).convert("L")


def serve(control: int, memory: int) -> None:
    """Decode what the parent asks for, until it is gone.

    Args:
        control: Socket: a length and ``Wanted`` in, the number of pixels out, a byte in if it is
            not too many, and out what was made or why nothing is.
        memory: File: the picture's bytes in, so many, and its pixels out.
    """
    with connected(control) as parent:
        Image.init()
        Image.MAX_IMAGE_PIXELS = None  # ``Wanted`` has ours
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
        while message := parent.recv(2**16):
            length, wanted = json.loads(message)
            parent.send(json.dumps(_made(length, Wanted(*wanted), memory, parent)).encode())


def _made(length: int, wanted: Wanted, memory: int, parent: socket.socket) -> dict[str, object]:
    def count(pixels: int) -> None:
        parent.send(json.dumps({"pixels": pixels}).encode())
        parent.recv(1)  # or it kills us

    most = _MEMORY[0] + _MEMORY[1] * wanted.max_pixels
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
    try:
        picture, changed = decode(os.pread(memory, length, 0), wanted, count)
        length = 0
        for top in range(0, picture.height, _BAND):  # its bytes are a copy
            band = picture.crop((0, top, picture.width, min(top + _BAND, picture.height)))
            length += os.pwrite(memory, band.tobytes(), length)
    except RefusedError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"refused": f"decoding it takes more memory than {most // 2**20} MiB"}
    return {"mode": picture.mode, "size": picture.size, "length": length, "changed": changed}


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
