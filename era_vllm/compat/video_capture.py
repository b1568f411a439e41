"""Where vLLM opens a video, so that it can be opened in another process.

All else of its loaders runs as it is: what the file says of its frames, which of them are sampled,
how they are read one after another.

Upstream: vllm/multimodal/video_decoders/opencv.py:75 ``OpenCVVideoBackendMixin.open_video_capture``
(0.32.0), which ``decode_opencv`` calls for each loader whose ``backend`` is ``opencv``.
Private use: that function is replaced, for callers within ``opening`` alone.
Remove when: a loader can be given an opened video, or a function that opens one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from inspect import signature
from typing import Final

from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

from era_vllm.errors import UnsupportedError

Open = Callable[[bytes], object]
"""Of a file; returns what does as a ``cv2.VideoCapture``."""
_OPEN: Final[ContextVar[Open | None]] = ContextVar("era_open_video", default=None)


@contextmanager
def opening(open_: Open) -> Iterator[None]:
    """Have vLLM open videos by a function, in this context alone.

    Raises:
        UnsupportedError: this vLLM opens them elsewhere.
    """
    _replace()
    token = _OPEN.set(open_)
    try:
        yield
    finally:
        _OPEN.reset(token)


@cache
def _replace() -> None:
    stock = getattr(OpenCVVideoBackendMixin, "open_video_capture", None)
    if stock is None or list(signature(stock).parameters) != ["data"]:
        raise UnsupportedError(
            "vLLM's OpenCVVideoBackendMixin.open_video_capture: not found with one argument, data; "
            "videos cannot be decoded in processes of their own with this vLLM"
        )

    def open_video_capture(data: bytes) -> object:
        open_ = _OPEN.get()
        return stock(data) if open_ is None else open_(data)

    OpenCVVideoBackendMixin.open_video_capture = staticmethod(open_video_capture)
