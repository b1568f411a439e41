"""A video as vLLM loads it, but that another process opens and decodes it.

vLLM's own loader runs here, in a thread: it asks how many frames there are, decides which ones it
samples, and reads them one after another, of a ``Capture`` that passes each question on. So
``num_frames`` and ``fps`` mean what they mean in vLLM. What comes back is checked like what a
client sends: a decoder may have been taken over by what it decodes. Leaves out where the bytes come
from (``media``), what a video may be (``era_vllm.videos``) and the processes (``decoders``).
"""

import asyncio
import json
import os
import socket
import sys
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import astuple
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from era_vllm.compat.video_capture import opening
from era_vllm.decoder_process import RefusedError
from era_vllm.videos import FPS, FRAMES, HEIGHT, OPTIONS, WIDTH, VideoBounds, check_opened
from era_vllm_server.decoders import Decoders

_COMMAND: Final = (sys.executable, "-P", "-W", "ignore", "-m", "era_vllm.videos")
_OWN: Final = "opencv"
"""The only one of vLLM's backends whose decoding can be moved into another process."""
Loaded = MediaWithBytes[Any]
Take = Callable[[object, int], Awaitable[None]]
"""Count pixels before they are decoded, for as long as an object lives; may raise."""


class Frames:
    """Stands for the frames of a video until there are some: what ``Take`` counts by."""


async def load(data: bytes, media_io: VideoMediaIO, bounds: VideoBounds, take: Take) -> Loaded:
    """Return what ``media_io.load_bytes`` would.

    Args:
        media_io: How frames are sampled.
        take: Is told the pixels of all sampled frames.

    Raises:
        RefusedError: it is not served.
        GracefulHTTPError: no process was free in time, or none could be started; a 503.
        Exception: what vLLM's loader raises of a file that it cannot sample.
    """
    kwargs, loader = media_io.kwargs, type(media_io.video_loader)
    if kwargs.get("backend", _OWN) != _OWN or _needs_gpu(loader):
        raise RefusedError("this server decodes videos by vLLM's backend 'opencv' alone")
    loop, held = asyncio.get_running_loop(), Frames()
    async with _decoders(bounds.processes).lent(bounds.decode_s) as process:
        process.working = True
        capture = Capture(*process.files(), bounds)

        def sampled(count: int) -> None:
            if not 0 < count <= bounds.sampled_frames:
                most = bounds.sampled_frames
                raise RefusedError(f"of its frames {count} are sampled, allowed are 1 to {most}")
            pixels = count * capture.width * capture.height
            asyncio.run_coroutine_threadsafe(take(held, pixels), loop).result()
            capture.frames_left = count

        media_io.video_loader = _counted(loader, sampled)()
        try:
            loaded = await asyncio.to_thread(capture.load, data, media_io)
        finally:
            process.working = not capture.is_closed
        process.trim(len(data))
    frames, facts = loaded.media
    if not len(frames):
        if facts["total_num_frames"] == 1:  # vLLM looks for its end, and does not find the way back
            raise RefusedError("it has one frame alone, which vLLM does not read; send a picture")
        raise RefusedError("none of its frames can be decoded: truncated, or damaged")
    # ``held`` lives as long as they do, or any part of them
    weakref.finalize(frames if frames.base is None else frames.base, id, held).atexit = False
    return loaded


def _counted(loader: type[VideoLoader], sampled: Callable[[int], None]) -> type[VideoLoader]:
    """Return a loader that tells how many frames it is about to read."""

    class Counted(loader):
        @classmethod
        def read_frames(
            cls, cap: Any, frame_idx: list[int], *arguments: Any, **named: Any
        ) -> tuple[NDArray[np.uint8], list[int]]:
            sampled(len(set(frame_idx)))
            return super().read_frames(cap, frame_idx, *arguments, **named)

    return Counted


def _needs_gpu(loader: type[VideoLoader]) -> bool:
    names = (name for name, known in VIDEO_LOADER_REGISTRY.name2class.items() if known is loader)
    return any(VIDEO_LOADER_REGISTRY.backend_requires_gpu(name) for name in names)


class Capture:
    """Does as a ``cv2.VideoCapture``, but in another process, whose ``files`` it closes at the end.

    Of one thread.
    """

    def __init__(self, control: socket.socket, memory: int, bounds: VideoBounds) -> None:
        self._control, self._bounds = control, bounds
        self._memory = os.fdopen(memory, "r+b", buffering=0)
        self._facts: dict[int, float] = {}
        self.width = self.height = 0
        self.frames_left = 0
        """That may still be handed out: so many were counted."""
        self._grabs_left = bounds.frames + 1  # vLLM tries one behind the last
        self.is_closed = False
        """The process is free for another video."""

    def load(self, data: bytes, media_io: VideoMediaIO) -> Loaded:
        """Have vLLM load it."""
        with self._control, self._memory:
            self._control.settimeout(self._bounds.decode_s + 1)  # it is killed before
            try:
                with opening(self._open):
                    loaded = media_io.load_bytes(data)
            except OSError:  # it is gone, or about to be
                raise
            except BaseException:
                self._close()
                raise
            self._close()
            return loaded

    def _open(self, data: bytes) -> "Capture":
        self._memory.seek(0)
        self._memory.write(data)
        values = self._ask("open", len(data), *astuple(self._bounds))
        width, height, fps, frames = map(float, values)
        check_opened(width, height, fps, frames, self._bounds)
        self.width, self.height = int(width), int(height)
        self._facts = {WIDTH: width, HEIGHT: height, FPS: fps, FRAMES: frames}
        return self

    def _close(self) -> None:
        self._ask("close")
        self.is_closed = True

    def _ask(self, *message: object) -> Any:
        self._control.sendall(json.dumps(message).encode())
        if not (answer := self._control.recv(2**16)):
            raise ConnectionResetError
        said = json.loads(answer)
        if "refused" in said:
            raise RefusedError(str(said["refused"]))
        return said["value"]

    def get(self, name: int) -> float:
        return self._facts[name] if name in self._facts else float(self._ask("get", name))

    def set(self, name: int, value: float) -> bool:
        return bool(self._ask("set", name, value))

    def grab(self) -> bool:
        self._grabs_left -= 1
        if self._grabs_left < 0:
            raise RefusedError(
                f"it has more frames than the {self._bounds.frames} that are allowed"
            )
        return bool(self._ask("grab"))

    def retrieve(self) -> tuple[bool, NDArray[np.uint8] | None]:
        """Return the frame that was decoded, [height, width, 3], BGR; False = it is broken."""
        if (shape := self._ask("retrieve")) is None:
            return False, None
        if shape != [self.height, self.width, 3]:
            size = f"{self.width} x {self.height}"
            raise RefusedError(f"its frames change: the first have {size} pixels, others not")
        self.frames_left -= 1
        if self.frames_left < 0:
            raise RefusedError("it has more frames than were to be sampled")
        frame = np.empty(shape, np.uint8)
        if os.preadv(self._memory.fileno(), [frame.data], 0) != frame.nbytes:
            raise ConnectionResetError
        return True, frame

    def read(self) -> tuple[bool, NDArray[np.uint8] | None]:
        return self.retrieve() if self.grab() else (False, None)


@lru_cache(1)
def _decoders(count: int) -> Decoders:
    """Return those of this process."""
    return Decoders(count, "video", _COMMAND, OPTIONS)
