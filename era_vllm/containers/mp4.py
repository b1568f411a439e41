"""The header of an MP4 or MOV: boxes within boxes (ISO 14496-12), with tables of samples.

Leaves out boxes of sound, and where the samples stand.
"""

import re
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Final

from era_vllm.containers.header import Header, Track
from era_vllm.decoder_process import RefusedError

_DEPTH: Final = 10
_HOLDERS: Final = frozenset(
    {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"mvex", b"moof", b"traf", b"edts"}
)
_MP4_CODECS: Final = {
    **{b"avc1": "H264", b"avc3": "H264", b"hvc1": "HEVC", b"hev1": "HEVC"},
    **{b"vp08": "VP8", b"vp09": "VP9", b"av01": "AV1"},
}
_MPEG4: Final = 0x20
"""Object type of MPEG-4 part 2; ``mp4v`` may be a dozen others, MPEG-2 and PNG among them."""


def read_mp4(data: bytes) -> Header:
    """Read all boxes; struct.error = one is too short."""
    header = Header("MOV" if data[8:12] == b"qt  " else "MP4")
    fragments = Counter[int]()
    _boxes(memoryview(data), header, fragments)
    for track in header.tracks:
        track.frames += fragments[track.number]
    return header


def _boxes(data: memoryview, header: Header, fragments: Counter[int], depth: int = 0) -> None:
    """Read boxes, and those within them; ``fragments``: a track's number -> its samples there."""
    if depth > _DEPTH:
        raise RefusedError(f"its {header.container} has boxes within boxes, deeper than {_DEPTH}")
    number = 0
    for kind, body in _each_box(data, header):
        if kind == b"trak":
            header.tracks.append(Track())
        if kind in _HOLDERS:
            _boxes(body, header, fragments, depth + 1)
        elif kind == b"cmov":
            raise RefusedError("the header of its MOV is compressed (cmov), which is not taken")
        elif kind == b"mvhd":
            header.seconds = max(header.seconds, _duration(body))
        elif kind == b"tfhd":
            (number,) = struct.unpack_from(">I", body, 4)
        elif kind == b"trun":
            fragments[number] += struct.unpack_from(">I", body, 4)[0]
        elif header.tracks:
            _track_box(kind, body, header.tracks[-1], header)


def _track_box(kind: bytes, body: memoryview, track: Track, header: Header) -> None:
    if kind == b"tkhd":
        (track.number,) = struct.unpack_from(">I", body, 20 if body[0] else 12)
    elif kind == b"mdhd":
        track.seconds = max(track.seconds, _duration(body))
    elif kind == b"hdlr":
        track.shows |= bytes(body[8:12]) == b"vide"
    elif kind in (b"stsz", b"stz2"):
        track.frames = max(track.frames, struct.unpack_from(">I", body, 8)[0])
    elif kind == b"stts":
        counts = body[8:][: 8 * struct.unpack_from(">I", body, 4)[0]]
        whole = counts[: len(counts) // 8 * 8]
        track.frames = max(
            track.frames, sum(count for count, _ in struct.iter_unpack(">II", whole))
        )
    elif kind == b"stsd" and track.shows:
        for name, entry in _each_box(body[8:], header):
            width, height = struct.unpack_from(">HH", entry, 24)
            track.width, track.height = max(track.width, width), max(track.height, height)
            codec = _MP4_CODECS.get(name, ascii(name.decode("latin-1"))[1:-1])
            esds = next(
                (box for kind, box in _each_box(entry[78:], header) if kind == b"esds"), b""
            )
            if name == b"mp4v" and (not esds or _object_type(bytes(esds)) == _MPEG4):
                codec = "MPEG4"
            track.codec = codec if track.codec in ("none", codec) else "of several kinds"


def _each_box(data: memoryview, header: Header) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the kinds and contents of boxes; one that is longer than its parent ends with it."""
    at = 0
    while at + 8 <= len(data):
        header.count()
        size, kind = struct.unpack_from(">I4s", data, at)
        start = 8
        if size == 1:
            (size,), start = struct.unpack_from(">Q", data, at + 8), 16
        elif size == 0:
            size = len(data) - at
        if size < start:
            return
        yield kind, data[at + start : at + size]
        at += size


def _duration(body: memoryview) -> float:
    """Return the seconds of a movie's or a track's header; 0 = it does not say."""
    form, at = (">IQ", 20) if body[0] else (">II", 12)
    scale, duration = struct.unpack_from(form, body, at)
    unknown = duration == (2**64 - 1 if body[0] else 2**32 - 1)
    return 0.0 if unknown else duration / (scale or 1)


def _object_type(esds: bytes) -> int:
    """Return what kind of stream ``mp4v`` is (ISO 14496-1, 7.2.6); -1 = it is written otherwise."""
    found = re.match(
        rb".{4}\x03[\x80-\xff]{0,3}[\0-\x7f].{2}\0\x04[\x80-\xff]{0,3}[\0-\x7f](.)",
        esds,
        re.DOTALL,
    )
    return found[1][0] if found else -1
