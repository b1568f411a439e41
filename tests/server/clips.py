"""Videos of a few KB for tests: what OpenCV writes, and H.264 of our own, so that headers can lie.

Frame ``i`` of a clip has one grey in all pixels, ``shade(i)``: which frames were sampled is seen.
"""

import io
import struct
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SIZE = (64, 48)
WRITTEN = {
    "MP4, MPEG-4": ("mp4", "mp4v"),
    "MP4, VP9": ("mp4", "vp09"),
    "MOV, MPEG-4": ("mov", "mp4v"),
    "WebM, VP8": ("webm", "VP80"),
    "WebM, VP9": ("webm", "VP90"),
    "MKV, VP9": ("mkv", "VP90"),
}
"""Name -> ending and code of OpenCV's writer."""


def shade(index: int) -> int:
    """Return the grey of a frame: 24 of them, apart enough for lossy codecs."""
    return 20 + index % 24 * 9


@cache
def written(
    ending: str, code: str, frames: int = 30, size: tuple[int, int] = SIZE, fps: float = 10.0
) -> bytes:
    """Return what OpenCV writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{ending}"
        fourcc = cv2.VideoWriter.fourcc(*code)
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, fourcc, fps, size)
        assert writer.isOpened(), code
        for index in range(frames):
            writer.write(np.full((size[1], size[0], 3), shade(index), np.uint8))
        writer.release()
        return path.read_bytes()


def gif(frames: int = 30) -> bytes:
    """Return an animation of 10 frames a second; one bit differs, else equal frames are one."""
    pictures = [Image.new("RGB", SIZE, (shade(at),) * 3) for at in range(frames)]
    with io.BytesIO() as buffer:
        pictures[0].save(buffer, "gif", save_all=True, append_images=pictures[1:], duration=100)
        return buffer.getvalue()


class Bits:
    """A string of bits, as H.264 writes its headers."""

    def __init__(self) -> None:
        self.text = ""

    def fixed(self, value: int, length: int) -> "Bits":
        """Add a number of so many bits."""
        self.text += f"{value:0{length}b}"
        return self

    def golomb(self, *values: int) -> "Bits":
        """Add numbers of as many bits as they take."""
        for value in values:
            text = f"{value + 1:b}"
            self.text += "0" * (len(text) - 1) + text
        return self

    def aligned(self, stop: bool = False) -> bytes:
        """Return bytes, filled up; ``stop``: behind the bit that ends a unit."""
        text = self.text + "1" * stop
        text += "0" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8)


def _unit(kind: int, content: bytes) -> bytes:
    escaped, zeros = bytearray([kind]), 0
    for byte in content:
        if zeros >= 2 and byte <= 3:
            escaped.append(3)
            zeros = 0
        escaped.append(byte)
        zeros = 0 if byte else zeros + 1
    return bytes(escaped)


def _parameters(size: tuple[int, int]) -> tuple[bytes, bytes]:
    sequence = Bits().fixed(66, 8).fixed(0, 8).fixed(51, 8).golomb(0, 0, 2, 0).fixed(0, 1)
    sequence.golomb(size[0] // 16 - 1, size[1] // 16 - 1).fixed(0b1000, 4)
    picture = (
        Bits().golomb(0, 0).fixed(0, 2).golomb(0, 0, 0).fixed(0, 3).golomb(0, 0, 0).fixed(0, 3)
    )
    return _unit(0x67, sequence.aligned(stop=True)), _unit(0x68, picture.aligned(stop=True))


def _coded(index: int, size: tuple[int, int]) -> bytes:
    """Return a frame whose pixels are written as they are (I_PCM)."""
    head = Bits().golomb(0, 7, 0).fixed(0, 4).golomb(index % 2).fixed(0, 2).golomb(0)
    pixels = bytes([16 + shade(index) * 219 // 255]) * 256 + b"\x80" * 128
    content = head.golomb(25).aligned() + pixels
    for _ in range(size[0] // 16 * (size[1] // 16) - 1):
        content += Bits().golomb(25).aligned() + pixels
    return _unit(0x65, content + b"\x80")


def _flat(index: int, size: tuple[int, int]) -> bytes:
    """Return a grey frame of 8 bits a block: each is what its neighbours are (I_16x16, DC)."""
    head = Bits().golomb(0, 7, 0).fixed(0, 4).golomb(index % 2).fixed(0, 2).golomb(0)
    head.text += "00100111" * (size[0] // 16 * (size[1] // 16))
    return _unit(0x65, head.aligned(stop=True))


def box(kind: bytes, *contents: bytes) -> bytes:
    """Return a box of an MP4."""
    content = b"".join(contents)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def words(*values: int) -> bytes:
    """Return numbers of 32 bits."""
    return struct.pack(f">{len(values)}I", *values)


def h264(
    frames: int = 30,
    size: tuple[int, int] = (64, 48),
    says_size: tuple[int, int] | None = None,
    says_frames: int | None = None,
    says_seconds: float | None = None,
    codec: bytes = b"avc1",
    durations: Sequence[tuple[int, int]] = (),
    more: bytes = b"",
    sizes: Sequence[tuple[int, int]] = (),
    flat: bool = False,
) -> bytes:
    """Return an MP4 of H.264, 10 frames a second.

    Args:
        frames: In it.
        size: Of each, as the codec has it; multiples of 16.
        says_size: In the container's header. ``says_frames``, ``says_seconds``: likewise.
        codec: As the header names it.
        durations: (frames, hundredths of a second each), where it is not the same for all.
        more: Boxes at the movie's end.
        sizes: Of frames that have others than ``size``, each with parameters before it.
        flat: All frames are one grey, in few bytes.
    """
    coded = _flat if flat else _coded
    sequence, picture = _parameters(size)
    samples = [
        struct.pack(">I", len(unit)) + unit
        for unit in (coded(index, size) for index in range(frames))
    ]
    for other in sizes:
        units = (*_parameters(other), coded(0, other))
        samples.append(b"".join(struct.pack(">I", len(unit)) + unit for unit in units))
    frames = len(samples)
    count = frames if says_frames is None else says_frames
    durations = durations or [(count, 10)]
    ticks = sum(number * each for number, each in durations)
    if says_seconds is not None:
        ticks = int(says_seconds * 100)
    width, height = says_size or size
    start = box(b"ftyp", b"isom", words(512), b"isomavc1")
    config = b"\x01\x42\x00\x33\xff\xe1" + struct.pack(">H", len(sequence)) + sequence
    config += b"\x01" + struct.pack(">H", len(picture)) + picture
    entry = bytes(6) + b"\0\1" + bytes(16) + struct.pack(">HH", width, height)
    entry += words(72 << 16, 72 << 16, 0) + b"\0\1" + bytes(32) + b"\0\x18\xff\xff"
    matrix = words(1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    table = box(
        b"stbl",
        box(b"stsd", words(0, 1), box(codec, entry, box(b"avcC", config))),
        box(b"stts", words(0, len(durations), *(n for pair in durations for n in pair))),
        box(b"stsc", words(0, 1, 1, frames, 1)),
        box(b"stsz", words(0, 0, count, *map(len, samples))),
        box(b"stco", words(0, 1, len(start) + 8)),
    )
    data = box(b"dinf", box(b"dref", words(0, 1), box(b"url ", words(1))))
    media = box(
        b"mdia",
        box(b"mdhd", words(0, 0, 0, 100, ticks), b"\x55\xc4\0\0"),
        box(b"hdlr", words(0, 0), b"vide", bytes(13)),
        box(b"minf", box(b"vmhd", words(1), bytes(8)), data, table),
    )
    head = words(3, 0, 0, 1, 0, ticks) + bytes(16) + matrix + words(width << 16, height << 16)
    movie = box(
        b"moov",
        box(
            b"mvhd",
            words(0, 0, 0, 100, ticks, 1 << 16),
            b"\1\0",
            bytes(10),
            matrix,
            bytes(24),
            words(2),
        ),
        box(b"trak", box(b"tkhd", head), media),
        more,
    )
    return start + box(b"mdat", *samples) + movie


def sound(samples: int = 800) -> bytes:
    """Return a track of sound, 8,000 samples of 2 bytes a second, whatever the file has."""
    entry = bytes(6) + b"\0\1" + bytes(8) + b"\0\1\0\x10" + bytes(4) + words(8000 << 16)
    table = box(
        b"stbl",
        box(b"stsd", words(0, 1), box(b"sowt", entry)),
        box(b"stts", words(0, 1, samples, 1)),
        box(b"stsc", words(0, 1, 1, samples, 1)),
        box(b"stsz", words(0, 2, samples)),
        box(b"stco", words(0, 1, 64)),
    )
    data = box(b"dinf", box(b"dref", words(0, 1), box(b"url ", words(1))))
    media = box(
        b"mdia",
        box(b"mdhd", words(0, 0, 0, 8000, samples), b"\x55\xc4\0\0"),
        box(b"hdlr", words(0, 0), b"soun", bytes(13)),
        box(b"minf", box(b"smhd", bytes(8)), data, table),
    )
    head = words(3, 0, 0, 2, 0, samples // 80) + bytes(60)
    return box(b"trak", box(b"tkhd", head), media)
