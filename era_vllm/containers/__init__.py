"""What the headers of a video say of it: nothing is decoded for that, and nothing is believed yet.

MP4 and MOV (ISO 14496-12), WebM and Matroska (RFC 9559), GIF, told apart by their bytes. What is
counted is what a decoder goes through: samples of its tables, blocks of its clusters. Leaves out
what is allowed (``videos``), audio and subtitles. The standard library alone.
"""

import re
import struct
from typing import Final

from era_vllm.containers.gif import read_gif
from era_vllm.containers.header import Header
from era_vllm.containers.matroska import read_matroska
from era_vllm.containers.mp4 import read_mp4
from era_vllm.decoder_process import RefusedError

__all__ = ["Header", "header_of"]
_MP4: Final = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})
_EBML: Final = b"\x1aE\xdf\xa3"
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


def header_of(data: bytes) -> Header:
    """Return what a file says of itself.

    Raises:
        RefusedError: it is no container that is known, or no whole one.
    """
    try:
        if data.startswith(_EBML):
            header = read_matroska(data)
        elif data.startswith((b"GIF87a", b"GIF89a")):
            header = read_gif(data)
        elif data[4:8] in _MP4:
            header = read_mp4(data)
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
