"""A video made of nothing: H.264 in an MP4, of grey squares, without an encoder or a package.

Every square of 16 x 16 pixels is written as it is (I_PCM), so that random ones make a video that no
cache has seen, and any decoder reads it. For the load tests here and ``smoke.py`` above.
"""

import base64
import random
import re
import struct

_SQUARE = 16
_TICKS = 1000  # of a second, in the container's clock
_MATRIX = struct.pack(">9I", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


def clip_url(lots: random.Random, width: int, height: int, frames: int, fps: float = 2.0) -> str:
    """Return a video as a data URL."""
    video = base64.b64encode(clip(lots, width, height, frames, fps)).decode()
    return "data:video/mp4;base64," + video


def clip(lots: random.Random, width: int, height: int, frames: int, fps: float = 2.0) -> bytes:
    """Return a video.

    Args:
        lots: What its squares are drawn by.
        width, height: Pixels, multiples of 16.
        frames: How many.
        fps: Of them, a second.
    """
    squares = width // _SQUARE, height // _SQUARE
    parameters = _unit(0x67, _sequence(*squares)), _unit(0x68, _pictures())
    coded = [_unit(0x65, _frame(lots, index, *squares)) for index in range(frames)]
    samples = [struct.pack(">I", len(unit)) + unit for unit in coded]
    start = _box(b"ftyp", b"isom", struct.pack(">I", 512), b"isomavc1")
    each = round(_TICKS / fps)
    movie = _movie((width, height), parameters, [*map(len, samples)], each, len(start) + 8)
    return start + _box(b"mdat", *samples) + movie


def _frame(lots: random.Random, index: int, columns: int, rows: int) -> bytes:
    """Return a slice that holds a whole picture, which needs no other one (IDR)."""
    head = _golomb(0, 7, 0) + "0000" + _golomb(index % 2) + "00" + _golomb(0)
    written = b""
    for _ in range(columns * rows):
        bits = head + _golomb(25)  # 25 = I_PCM, behind it zeros up to a whole byte
        written += _bytes(bits) + bytes([lots.randrange(16, 236)]) * 256 + b"\x80" * 128
        head = ""
    return written + b"\x80"


def _sequence(columns: int, rows: int) -> bytes:
    bits = f"{66:08b}{0:08b}{51:08b}" + _golomb(0, 0, 2, 0) + "0"
    return _bytes(bits + _golomb(columns - 1, rows - 1) + "1000" + "1")


def _pictures() -> bytes:
    bits = _golomb(0, 0) + "00" + _golomb(0, 0, 0) + "000" + _golomb(0, 0, 0) + "000"
    return _bytes(bits + "1")


def _golomb(*values: int) -> str:
    """Return numbers of as many bits as they take."""
    written = [f"{value + 1:b}" for value in values]
    return "".join("0" * (len(bits) - 1) + bits for bits in written)


def _bytes(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def _unit(kind: int, content: bytes) -> bytes:
    """Return a unit, in which no two zeros stand before a byte up to 3: that would end it."""
    return bytes([kind]) + re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", content)


def _movie(
    size: tuple[int, int], parameters: tuple[bytes, bytes], lengths: list[int], each: int, at: int
) -> bytes:
    """Return the index of the samples.

    Args:
        size: Width and height.
        parameters: Of the codec: sequence and pictures.
        lengths: Bytes of each sample.
        each: Ticks of a frame.
        at: Where the first sample begins.
    """
    frames, ticks = len(lengths), len(lengths) * each
    sequence, pictures = parameters
    config = b"\x01\x42\x00\x33\xff\xe1" + struct.pack(">H", len(sequence)) + sequence
    config += b"\x01" + struct.pack(">H", len(pictures)) + pictures
    entry = bytes(6) + b"\0\1" + bytes(16) + struct.pack(">HH", *size)
    entry += _words(72 << 16, 72 << 16, 0) + b"\0\1" + bytes(32) + b"\0\x18\xff\xff"
    table = _box(
        b"stbl",
        _box(b"stsd", _words(0, 1), _box(b"avc1", entry, _box(b"avcC", config))),
        _box(b"stts", _words(0, 1, frames, each)),
        _box(b"stsc", _words(0, 1, 1, frames, 1)),
        _box(b"stsz", _words(0, 0, frames, *lengths)),
        _box(b"stco", _words(0, 1, at)),
    )
    data = _box(b"dinf", _box(b"dref", _words(0, 1), _box(b"url ", _words(1))))
    media = _box(
        b"mdia",
        _box(b"mdhd", _words(0, 0, 0, _TICKS, ticks), b"\x55\xc4\0\0"),
        _box(b"hdlr", _words(0, 0), b"vide", bytes(13)),
        _box(b"minf", _box(b"vmhd", _words(1), bytes(8)), data, table),
    )
    track = _words(3, 0, 0, 1, 0, ticks) + bytes(16) + _MATRIX
    track += _words(size[0] << 16, size[1] << 16)
    head = _words(0, 0, 0, _TICKS, ticks, 1 << 16) + b"\1\0" + bytes(10) + _MATRIX
    return _box(
        b"moov",
        _box(b"mvhd", head, bytes(24), _words(2)),
        _box(b"trak", _box(b"tkhd", track), media),
    )


def _box(kind: bytes, *contents: bytes) -> bytes:
    content = b"".join(contents)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)
