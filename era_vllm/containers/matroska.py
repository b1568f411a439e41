"""The header of a WebM or MKV: elements of EBML (RFC 8794, RFC 9559).

It says nothing of how many frames there are: blocks are counted. Leaves out what a block holds.
"""

import struct
from collections import Counter
from typing import Final

from era_vllm.containers.header import Header, Track

_MKV_CODECS: Final = {
    **{"V_MPEG4/ISO/AVC": "H264", "V_MPEGH/ISO/HEVC": "HEVC", "V_VP8": "VP8", "V_VP9": "VP9"},
    **{"V_AV1": "AV1", "V_MPEG4/ISO/SP": "MPEG4", "V_MPEG4/ISO/ASP": "MPEG4"},
}
_MKV_HOLDERS: Final = frozenset(
    {0x1A45DFA3, 0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675, 0xA0}
)
"""EBML, Segment, Info, Tracks, TrackEntry, Video, Cluster, BlockGroup."""
_MKV_LEAVES: Final = frozenset(
    {0x4282, 0x2AD7B1, 0x4489, 0xE7, 0xA3, 0xA1, 0xD7, 0x83, 0x86, 0xB0, 0xBA}
)
"""DocType, TimestampScale, Duration, Timestamp, SimpleBlock, Block; of a track its number, type,
codec, width and height."""


def read_matroska(data: bytes) -> Header:
    """Read elements one after another, those of holders too: where one ends is of no use."""
    header, blocks, at = Header("MKV"), Counter[int](), 0
    scale, duration, since, last = 1_000_000, 0.0, 0, 0
    while at < len(data):
        header.count()
        name, at = _number(data, at, marked=True)
        if at >= len(data):  # cut off, which is no damage to what came before
            break
        size, at = _number(data, at)
        if name in _MKV_HOLDERS:
            if name == 0xAE:
                header.tracks.append(Track())
            continue
        start, at = at, at + size
        if at > len(data):
            break
        if name not in _MKV_LEAVES:
            continue
        body = data[start : start + min(size, 64)]
        track = header.tracks[-1] if header.tracks else Track()
        if name == 0x4282 and body.startswith(b"webm"):
            header.container = "WebM"
        elif name == 0x2AD7B1:
            scale = int.from_bytes(body[:8])
        elif name == 0x4489:
            (duration,) = struct.unpack(">f" if size == 4 else ">d", body)
        elif name == 0xE7:
            since = int.from_bytes(body[:8])
        elif name in (0xA3, 0xA1):
            number, time, frames = _block(body)
            blocks[number] += frames
            last = max(last, since + time)
        else:
            _track_element(name, body, track)
    header.seconds = max(duration, last) * scale / 1e9
    for track in header.tracks:
        track.frames = blocks[track.number]
    return header


def _track_element(name: int, body: bytes, track: Track) -> None:
    value = int.from_bytes(body[:8])
    if name == 0xD7:
        track.number = value
    elif name == 0x83:
        track.shows = value == 1
    elif name == 0x86:
        text = body.rstrip(b"\0").decode("latin-1")
        track.codec = _MKV_CODECS.get(text, ascii(text)[1:-1])
    elif name == 0xB0:
        track.width = max(track.width, value)
    elif name == 0xBA:
        track.height = max(track.height, value)


def _number(data: bytes, at: int, marked: bool = False) -> tuple[int, int]:
    """Return a number of EBML's, and where what follows begins; ``marked``: with its length bit."""
    length = 9 - data[at].bit_length()  # 9 = none that is allowed
    number = int.from_bytes(data[at : at + length])
    return number if marked else number & (1 << 7 * length) - 1, at + length


def _block(body: bytes) -> tuple[int, int, int]:
    """Return a block's track, its time since its cluster's, and its frames."""
    number, at = _number(body, 0)
    time, flags = struct.unpack_from(">hB", body, at)
    return number, time, body[at + 3] + 1 if flags & 6 else 1  # "lacing": many frames in one block
