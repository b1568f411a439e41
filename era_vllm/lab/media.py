"""Pictures and videos as files in memory, and as parts of a chat message.

Leaves out what they show (``synth/``) and who is asked about them (``asking.py``).
"""

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from PIL import Image

from era_vllm.errors import UnsupportedError

Kind = Literal["image", "video"]
_NEEDED: Final = "pip install opencv-python-headless"
_TYPES: Final = {"image": "image/png", "video": "video/mp4"}


@dataclass(frozen=True, slots=True)
class Medium:
    """A PNG, an MP4 (VP9), or what ``mime`` says."""

    kind: Kind
    data: bytes
    mime: str = ""

    def part(self) -> dict[str, object]:
        """Return it as a part of an OpenAI message."""
        url = f"data:{self.mime or _TYPES[self.kind]};base64,{base64.b64encode(self.data).decode()}"
        return {"type": f"{self.kind}_url", f"{self.kind}_url": {"url": url}}

    def picture(self) -> Image.Image:
        """Return an image's pixels, RGB."""
        return Image.open(io.BytesIO(self.data)).convert("RGB")


def png(image: Image.Image) -> Medium:
    """Return a picture as it is."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Medium("image", buffer.getvalue())


def mp4(frames: Sequence[Image.Image], per_second: float) -> Medium:
    """Return a video; its colours are off by a few shades, as of any lossy codec.

    Args:    frames: RGB, of one size with even sides.
    Raises:  UnsupportedError: no OpenCV that writes VP9.
    """
    import numpy as np

    try:
        import cv2  # vLLM brings it
    except ImportError as error:
        raise UnsupportedError(f"videos are written by OpenCV: {_NEEDED}") from error

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        code = cv2.VideoWriter.fourcc(*"vp09")
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, per_second, frames[0].size)
        if not writer.isOpened():
            raise UnsupportedError(f"this OpenCV has no VP9: {_NEEDED}")
        for frame in frames:
            writer.write(np.ascontiguousarray(np.asarray(frame.convert("RGB"))[..., ::-1]))
        writer.release()
        return Medium("video", path.read_bytes())


def of_frames(frames: Sequence[Image.Image], seconds: Sequence[float]) -> Medium:
    """Return a picture of one frame, or a video with a frame or more for each of its moments."""
    if len(frames) == 1:
        return png(frames[0])
    return mp4(frames, len(frames) / len(seconds) / (seconds[1] - seconds[0]))
