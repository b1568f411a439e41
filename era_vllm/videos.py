"""What a video may be, and the process in which its frames are decoded.

A hostile video costs what it likes once a decoder has it. Here its header meets the bounds first,
and then what the decoder makes of that header, since headers lie; memory has a cap, and
``era_vllm_server.decoders`` ends the process when time is up. Which frames are sampled is decided
elsewhere, by vLLM's own loaders (``era_vllm_server.videos``): the process does what a
``cv2.VideoCapture`` is asked for. Leaves out how headers are read (``containers``). OpenCV and the
standard library alone: a process starts in 0.3 s, where vLLM's own code takes 12.
"""

import json
import math
import os
import re
import resource
import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from era_vllm.containers import Header, header_of
from era_vllm.decoder_process import RefusedError, connected

if TYPE_CHECKING:
    import cv2

CODECS: Final = ("H264", "HEVC", "VP8", "VP9", "MPEG4", "GIF")
"""What OpenCV's own FFmpeg decodes. AV1 it only reads: it has no decoder for it but a GPU's."""
OPTIONS: Final = {
    "OPENCV_FFMPEG_CAPTURE_OPTIONS": "format_whitelist;mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif",
    "OPENCV_FFMPEG_THREADS": "1",
    "OPENCV_FFMPEG_LOGLEVEL": "-8",
    "OPENCV_LOG_LEVEL": "SILENT",
    "OPENBLAS_NUM_THREADS": "1",
}
"""Variables of the process. FFmpeg has the list of containers too, should it read a file otherwise:
lists of other files, which it would open, are none. What is in a file is not logged."""
WIDTH, HEIGHT, FPS, FRAMES = 3, 4, 5, 7
"""``cv2.CAP_PROP_FRAME_WIDTH`` and so on."""
_MAX_ASPECT: Final = 200  # as of pictures
_MEMORY: Final = (2**28, 64)
"""Bytes that a process may have beyond its own, and more for each pixel of the largest frame: 16
frames that others are made from, of 3 bytes (10 bits, 4:2:0), one as 3 bytes, one on its way."""


@dataclass(frozen=True, slots=True)
class VideoBounds:
    """What a video may be."""

    seconds: float = 600.0
    """Ten minutes are more than 20 MiB hold at what a telephone writes."""
    frames: int = 36_000
    """Ten minutes of 60 a second. All before the last one that is sampled are decoded too."""
    frame_pixels: int = 2**23
    """3840 x 2160 are 8,294,400."""
    sampled_frames: int = 768
    """Most that Qwen's loaders sample; with ``num_frames`` -1 others would take all."""
    decode_s: float = 60.0
    """To wait for other videos, and then to be decoded."""
    processes: int = 2
    """Of an API server; apart from those of pictures, which a video is not to hold up."""


def check_header(header: Header, bounds: VideoBounds) -> None:
    """Check what a file says of itself.

    Raises:
        RefusedError: it is out of bounds.
    """
    for track in header.tracks:
        if track.codec not in CODECS:
            raise RefusedError(f"its codec is {track.codec}, allowed are {', '.join(CODECS)}")
        _check(track.width, track.height, track.frames, bounds)
    _check_time(max(header.seconds, *(track.seconds for track in header.tracks)), bounds)


def check_opened(
    width: float, height: float, fps: float, frames: float, bounds: VideoBounds
) -> None:
    """Check what the decoder says of a file: of this, vLLM makes which frames are sampled.

    Args:
        width: And ``height``, of each frame.
        fps: A second; 0 = not known.
        frames: Of all; not above 0 = not known.

    Raises:
        RefusedError: it is out of bounds.
    """
    if not all(map(math.isfinite, (width, height, fps, frames))) or min(width, height) < 1:
        raise RefusedError("no frame of it can be decoded: truncated, or damaged")
    _check(int(width), int(height), int(frames), bounds)
    if fps < 0:
        raise RefusedError(f"it has {fps:g} frames a second, allowed are 0 (not known) or more")
    if fps:
        _check_time(frames / fps, bounds)


def _check(width: int, height: int, frames: int, bounds: VideoBounds) -> None:
    if width * height > bounds.frame_pixels:
        most = bounds.frame_pixels
        raise RefusedError(f"its frames have {width} x {height} pixels, allowed are {most} each")
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise RefusedError(
            f"its frames have {width} x {height} pixels, allowed is 1 : {_MAX_ASPECT}"
        )
    if frames > bounds.frames:
        raise RefusedError(f"it has {frames} frames, allowed are {bounds.frames}")


def _check_time(seconds: float, bounds: VideoBounds) -> None:
    if not seconds <= bounds.seconds:  # NaN too
        raise RefusedError(f"it lasts {seconds:g} s, allowed are {bounds.seconds:g} s")


def serve(control: int, memory: int) -> None:
    """Do what the parent asks of videos, one after another, until it is gone.

    Args:
        control: Socket: lists in, an object out for each. ``["open", length, bounds...]`` first;
            then names and arguments of ``cv2.VideoCapture``; ``["close"]`` last.
        memory: File: the video's bytes in, so many, and then the pixels of one frame out at a
            time, [height, width, 3], uint8, BGR.
    """
    import cv2  # the parent has no use for it

    cv2.setNumThreads(1)
    own = int(re.findall(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    capture: cv2.VideoCapture | None = None
    with connected(control) as parent:
        while message := parent.recv(2**16):
            name, *arguments = json.loads(message)
            try:
                if name == "open":
                    answer, capture = _opened(memory, own, *arguments)
                elif name == "close":
                    answer, capture = None, None
                elif name == "retrieve":
                    answer = _retrieved(capture, memory)
                else:
                    answer = getattr(capture, name)(*arguments)
                said = {"value": answer}
            except RefusedError as error:
                said = {"refused": str(error)}
            except (MemoryError, cv2.error):
                said = {"refused": "decoding it takes too much memory, or it is damaged"}
            parent.send(json.dumps(said).encode())


def _opened(
    memory: int, own: int, length: int, *values: float
) -> "tuple[list[float], cv2.VideoCapture]":
    import cv2

    bounds = VideoBounds(*values)  # type: ignore[arg-type]  # numbers, by their order
    data = os.pread(memory, length, 0)
    check_header(header_of(data), bounds)
    most = own + length + _MEMORY[0] + _MEMORY[1] * bounds.frame_pixels
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
    capture = cv2.VideoCapture(BytesIO(data), cv2.CAP_FFMPEG, [])
    if not capture.isOpened():
        raise RefusedError(f"its {length} bytes cannot be opened: truncated, or damaged")
    return [capture.get(name) for name in (WIDTH, HEIGHT, FPS, FRAMES)], capture


def _retrieved(capture: "cv2.VideoCapture | None", memory: int) -> list[int] | None:
    """Put a frame's pixels into memory; return its shape, None = it is broken."""
    assert capture is not None
    whole, frame = capture.retrieve()
    if not whole or frame is None or not frame.size:
        return None
    os.pwrite(memory, frame.data, 0)
    return list(frame.shape)


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
