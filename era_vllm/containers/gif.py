"""The header of a GIF: its pictures are counted, and their delays.

Leaves out what shows them again and again.
"""

import struct

from era_vllm.containers.header import Header, Track


def read_gif(data: bytes) -> Header:
    """Read a GIF's pictures and their delays, hundredths of a second."""
    header, track = Header("GIF"), Track("GIF", *struct.unpack_from("<HH", data, 6), shows=True)
    at, delays = 13 + _colours(data[10]), 0
    while at < len(data) and data[at] in b"!,":
        header.count()
        if data[at : at + 3] == b"!\xf9\x04":
            delays += struct.unpack_from("<H", data, at + 4)[0]
        start = at + 2
        if data[at] == ord(","):
            track.frames += 1
            left, top, width, height, flags = struct.unpack_from("<4HB", data, at + 1)
            track.width, track.height = (
                max(track.width, left + width),
                max(track.height, top + height),
            )
            start = at + 11 + _colours(flags)
        at = _behind_blocks(data, start, header)
    header.seconds = delays / 100
    header.tracks = [track] if track.frames else []
    return header


def _colours(flags: int) -> int:
    """Return the bytes of a table of colours."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _behind_blocks(data: bytes, at: int, header: Header) -> int:
    while at < len(data) and data[at]:
        header.count()
        at += data[at] + 1
    return at + 1
