"""What the headers of a video say of it: nothing is decoded for that, and nothing is believed yet.

MP4 and MOV (ISO 14496-12), WebM and Matroska (RFC 9559), GIF, told apart by their bytes. What is
counted is what a decoder goes through: samples of its tables, blocks of its clusters. Leaves out
what is allowed (``videos``), audio and subtitles. The standard library alone.
"""

import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from era_vllm.decoder_process import RefusedError

_PARTS: Final = 2**18
"""Of a header: ten minutes of 60 frames and 50 sounds a second, each in a group of its own, are
130,000. A second of reading at most."""
_DEPTH: Final = 10
_MP4: Final = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})
_HOLDERS: Final = frozenset(
    {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"mvex", b"moof", b"traf", b"edts"}
)
_MP4_CODECS: Final = {
    **{b"avc1": "H264", b"avc3": "H264", b"hvc1": "HEVC", b"hev1": "HEVC"},
    **{b"vp08": "VP8", b"vp09": "VP9", b"av01": "AV1"},
}
_MPEG4: Final = 0x20
"""Object type of MPEG-4 part 2; ``mp4v`` may be a dozen others, MPEG-2 and PNG among them."""
_EBML: Final = b"\x1aE\xdf\xa3"
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
_OTHERS: Final = {
    rb"RIFF....AVI": "AVI",
    rb"RIFF....WEBP": "WEBP",
    rb"\x89PNG|\xff\xd8": "a picture's",
    rb"FLV\x01": "FLV",
    rb"OggS": "OGG",
    rb"\x00\x00\x01[\xb3\xba]": "MPEG",
    rb"G.{187}G": "MPEG-TS",
    rb"#EXTM3U|ffconcat": "a list of other files",
}
"""How files begin that are not taken, so that they have a name."""


@dataclass(slots=True)
class Track:
    """A stream of pictures in a file."""

    codec: str = "none"
    width: int = 0
    height: int = 0
    frames: int = 0
    """0 = the header does not say."""
    seconds: float = 0.0
    number: int = 0
    shows: bool = False
    """It is no sound."""


@dataclass(slots=True)
class Header:
    """What a file says of itself."""

    container: str
    tracks: list[Track] = field(default_factory=list)
    seconds: float = 0.0
    parts: int = 0

    def count(self) -> None:
        """Count a part.

        Raises:
            RefusedError: there are too many.
        """
        self.parts += 1
        if self.parts > _PARTS:
            raise RefusedError(f"its {self.container} has more parts than the {_PARTS} allowed")


def header_of(data: bytes) -> Header:
    """Return what a file says of itself.

    Raises:
        RefusedError: it is no container that is known, or no whole one.
    """
    try:
        if data.startswith(_EBML):
            header = _matroska(data)
        elif data.startswith((b"GIF87a", b"GIF89a")):
            header = _gif(data)
        elif data[4:8] in _MP4:
            header = _mp4(data)
        else:
            named = (name for form, name in _OTHERS.items() if re.match(form, data, re.DOTALL))
            name = next(named, "not known")
            raise RefusedError(f"its format is {name}, allowed are MP4, MOV, WebM, MKV, GIF")
    except (struct.error, IndexError):
        raise RefusedError(
            f"the header of its {len(data)} bytes is truncated, or damaged"
        ) from None
    header.tracks = [track for track in header.tracks if track.shows]
    if not header.tracks:
        raise RefusedError(
            f"its {len(data)} bytes are no whole {header.container} with a video track: truncated, "
            "or damaged"
        )
    return header


def _mp4(data: bytes) -> Header:
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


def _matroska(data: bytes) -> Header:
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


def _gif(data: bytes) -> Header:
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
