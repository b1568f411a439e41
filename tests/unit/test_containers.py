"""What headers say, read without a decoder; and that no header keeps its reader for long."""

import re
import struct
import sys
import time

import pytest

from era_vllm.containers import header_of
from era_vllm.decoder_process import RefusedError
from era_vllm.videos import VideoBounds, check_header
from tests.server.clips import SIZE, WRITTEN, box, gif, h264, sound, words, written

BOUNDS = VideoBounds()


def ebml(name, content):
    return name + (1 << 56 | len(content)).to_bytes(8) + content


def matroska(*clusters, seconds=1.0, size=SIZE, live=False):
    """A header of VP9, and what stands for frames; ``live``: it does not say where it ends."""
    pixels = ebml(b"\xb0", struct.pack(">H", size[0])) + ebml(b"\xba", struct.pack(">H", size[1]))
    track = ebml(b"\xd7", b"\1") + ebml(b"\x83", b"\1") + ebml(b"\x86", b"V_VP9")
    body = ebml(b"\x15\x49\xa9\x66", ebml(b"\x44\x89", struct.pack(">d", seconds * 1000)))
    body += ebml(b"\x16\x54\xae\x6b", ebml(b"\xae", track + ebml(b"\xe0", pixels)))
    body += b"".join(clusters)
    whole = ebml(b"\x18\x53\x80\x67", body)
    if live:
        whole = b"\x18\x53\x80\x67\1" + b"\xff" * 7 + body
    return ebml(b"\x1a\x45\xdf\xa3", ebml(b"\x42\x82", b"webm")) + whole


def cluster(time_ms, *blocks):
    return ebml(b"\x1f\x43\xb6\x75", ebml(b"\xe7", struct.pack(">I", time_ms)) + b"".join(blocks))


def block(flags=0, more=b""):
    return ebml(b"\xa3", b"\x81\0\0" + bytes([flags]) + more)


def fragment(count):
    return box(b"moof", box(b"traf", box(b"tfhd", words(0, 1)), box(b"trun", words(0, count))))


def renamed(data, old, new):
    assert old in data and len(old) == len(new)
    return data.replace(old, new)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_writers_write_is_read(name):
    data = written(*WRITTEN[name])
    container, codec = name.split(", ")
    header = header_of(data)
    (track,) = header.tracks
    assert (header.container, track.codec) == (container, codec.replace("-", ""))
    assert (track.width, track.height, track.frames) == (*SIZE, 30)
    assert max(header.seconds, track.seconds) == pytest.approx(3, abs=0.11)
    check_header(header, BOUNDS)


def test_h264_and_gif_are_read():
    for data, codec in ((h264(), "H264"), (gif(), "GIF")):
        header = header_of(data)
        (track,) = header.tracks
        assert (track.codec, track.width, track.height, track.frames) == (codec, *SIZE, 30)
        assert header.seconds == pytest.approx(3)


def test_files_that_say_little_are_read():
    live = header_of(matroska(cluster(0, block()), cluster(900, block()), seconds=0, live=True))
    assert (live.container, live.seconds, live.tracks[0].frames) == ("WebM", 0.9, 2)
    data = h264()
    unknown = re.sub(rb"(?s)(?<=mvhd.{16}).{4}", b"\xff" * 4, data)
    assert unknown != data and header_of(unknown).seconds == 0
    (track,) = header_of(h264(more=sound(10**6))).tracks
    assert (track.codec, track.frames) == ("H264", 30)


FOREIGN = {
    "AVI": (b"RIFF\0\0\0\0AVI LIST", "its format is AVI, allowed are MP4, MOV, WebM, MKV, GIF"),
    "a PNG": (b"\x89PNG\r\n\x1a\n", "its format is a picture's"),
    "a list": (b"#EXTM3U\nfile:///etc/passwd\n", "its format is a list of other files"),
    "concat": (b"ffconcat version 1.0\nfile /etc/passwd\n", "its format is a list of other files"),
    "nothing": (b"", "its format is not known"),
    "ProRes": (renamed(h264(1), b"avc1\0", b"apcn\0"), "its codec is apcn, allowed are H264, HEVC"),
    "AV1": (renamed(h264(1), b"avc1\0", b"av01\0"), "its codec is AV1, allowed are H264"),
    "odd": (renamed(h264(1), b"avc1\0", b"\0\n\xff'\0"), r"its codec is .x00.n.xff', allowed"),
    "MJPEG": (written("mkv", "MJPG"), "its codec is V_MJPEG"),
    "cmov": (h264(1, more=box(b"cmov")), r"is compressed \(cmov\)"),
    "sound": (renamed(h264(1), b"vide", b"soun"), "no whole MP4 with a video track"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_containers_and_codecs_are_told_by_bytes(name):
    data, said = FOREIGN[name]
    with pytest.raises(RefusedError, match=said):
        check_header(header_of(data), BOUNDS)


def test_mp4v_is_mpeg4_only_where_it_says_so():
    """The same four letters stand for MPEG-2, PNG and more."""
    data = written("mp4", "mp4v")
    at = data.index(b"esds") + 8
    kind = at + data[at:].index(b"\x04") + 5
    assert data[kind] == 0x20
    with pytest.raises(RefusedError, match="its codec is mp4v, allowed"):
        check_header(header_of(data[:kind] + b"\x61" + data[kind + 1 :]), BOUNDS)


GIF = b"GIF89a" + struct.pack("<HHBBB", 64, 48, 0, 0, 0)
FRAME = b"," + struct.pack("<4HB", 0, 0, 64, 48, 0) + b"\2\0"
BOMBS = {
    "size": (h264(1, says_size=(16384, 16384)), "16384 x 16384 pixels, allowed are 8388608 each"),
    "WebM, size": (matroska(size=(16384, 16384)), "16384 x 16384 pixels"),
    "GIF, size": (GIF[:6] + b"\0\x40\0\x40\0\0\0" + FRAME, "16384 x 16384 pixels"),
    "GIF, a frame's": (GIF + FRAME[:5] + b"\0\x40\0\x40" + FRAME[9:], "16384 x 16384 pixels"),
    "aspect": (h264(1, says_size=(16000, 16)), "16000 x 16 pixels, allowed is 1 : 200"),
    "frames": (h264(says_frames=10**6), "it has 1000000 frames, allowed are 36000"),
    "sizes": (h264(says_frames=2**32 - 1, durations=[(1, 1)]), "it has 4294967295 frames"),
    "times": (h264(durations=[(2**20, 0)] * 3), "it has 3145728 frames"),
    "fragments": (h264(2) + fragment(20_000) * 2, "it has 40002 frames"),
    "WebM, frames": (matroska(cluster(0, *[block()] * 36_001)), "it has 36001 frames"),
    "WebM, lacing": (matroska(cluster(0, *[block(2, b"\xff")] * 200)), "it has 51200 frames"),
    "GIF, frames": (GIF + FRAME * 36_001, "it has 36001 frames"),
    "time": (h264(says_seconds=36_000), "it lasts 36000 s, allowed are 600 s"),
    "WebM, time": (matroska(seconds=36_000), "it lasts 36000 s"),
    "WebM, its blocks' time": (matroska(cluster(36_000_000, block())), "it lasts 36000 s"),
    "WebM, no number": (matroska(seconds=float("nan")), "it lasts nan s"),
    "GIF, time": (GIF + (b"!\xf9\4\0\xff\xff\0\0" + FRAME) * 60, "it lasts 39321 s"),
    "parts": (h264(2) + box(b"free") * 2**18, "its MP4 has more parts than the 262144 allowed"),
    "WebM, parts": (matroska(b"\xec\x80" * 2**18), "its WebM has more parts"),
    "GIF, parts": (GIF + b"!\xff" + b"\1\0" * 2**18, "its GIF has more parts"),
    "depth": (box(b"ftyp") + 5000 * struct.pack(">I4s", 2**30, b"trak"), "boxes, deeper than 10"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bounds_come_before_a_decoder(name, monkeypatch):
    """None is in this process, and none of these headers takes long."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    data, said = BOMBS[name]
    began = time.process_time()
    with pytest.raises(RefusedError, match=said):
        check_header(header_of(data), BOUNDS)
    assert time.process_time() - began < 5


def test_a_box_that_is_longer_than_its_parent_hides_nothing():
    """It ends with its parent, as FFmpeg has it."""
    data = h264(1, says_size=(16384, 16384))
    track = data[data.index(b"trak") + 4 :]
    hider = box(b"edts", struct.pack(">I4s", 2**31 - 1, b"free"))
    found = header_of(box(b"ftyp") + box(b"moov", box(b"trak", hider, track)))
    assert found.tracks[0].width == 16384


def test_every_header_is_read_or_refused():
    """Cut off, or with a byte changed; by no other error."""
    seen = set()
    for data in (h264(1), written("webm", "VP90", 2), written("mp4", "mp4v", 2), gif(3)):
        for at in range(min(len(data), 900)):
            changed = [data[:at] + bytes([new]) + data[at + 1 :] for new in (0, 1, 127, 255)]
            for each in (data[:at], data[-at:], *changed):
                try:
                    check_header(header_of(each), BOUNDS)
                    seen.add("read")
                except RefusedError:
                    seen.add("refused")
    assert seen == {"read", "refused"}
