"""vLLM's media connector, chosen by ``VLLM_MEDIA_CONNECTOR``: what a client's URL may make us do.

A picture comes in the request (``data:``), from one of ``--allowed-media-domains`` at a public
address, or from below ``--allowed-local-media-path``. Whatever else comes is a 400 with a text of
ours: what PIL, the resolver or the file system say may hold addresses, names and paths. Pixels are
counted, of a request and of all, since vLLM decodes before it admits. Leaves out who may ask at all
(``middleware``), what a picture may be (``pictures``), and where it is decoded (``decoders``;
``videos``).

Upstream: vllm/multimodal/media/connector.py ``MediaConnector``, whose two ways to load a URL are
replaced (0.32.0). Its cache of downloads (``VLLM_MEDIA_CACHE``) is not used.
"""

import asyncio
import logging
import os
import re
import weakref
from collections import deque
from concurrent.futures import Future
from functools import lru_cache, partial
from pathlib import Path
from threading import Thread
from typing import Final, TypeVar, cast
from urllib.parse import unquote, urlsplit

import aiohttp
import pybase64
import vllm.envs as envs
import yarl
from PIL.Image import Image
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.audio import AudioMediaIO
from vllm.multimodal.media.base import MediaIO, MediaWithBytes
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO

from era_vllm.pictures import RefusedError, Wanted
from era_vllm.videos import VideoBounds
from era_vllm.vllm_plugin.requests import RequestContext, current
from era_vllm_server import videos
from era_vllm_server.addresses import allowed_hosts, public_socket
from era_vllm_server.decoders import Decoders, busy
from era_vllm_server.front import CONNECTOR
from era_vllm_server.metrics import REJECTED
from era_vllm_server.settings import PREFIX, ServerSettings

_M = TypeVar("_M")
_CHUNK: Final = 2**16
_REQUESTS: Final = 8
"""So many of the largest requests may hold their pictures at once. Pillow takes 4 bytes a pixel."""
_OF_URLS: Final = " (the alphabet of URLs: send + for - and / for _)"
_NOT_BASE64: Final = {
    "%": " (percent-encoded: undo that)",
    ",": " (several pictures: send each by itself)",
    "-": _OF_URLS,
    "_": _OF_URLS,
    "'": " (Python's b'...': send what is between the quotes)",
}
_OTHERS: Final = {VideoMediaIO: "video", AudioMediaIO: "audio"}
_log = logging.getLogger(__name__)


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class GuardedConnector(MediaConnector):
    """Loads what a URL names, or refuses."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        variables = tuple((name, value) for name, value in os.environ.items() if PREFIX in name)
        self.settings = _settings(variables)

    def load_from_url(
        self, url: str, media_io: MediaIO[_M], *, fetch_timeout: int | None = None
    ) -> _M:
        """Load for a caller without a loop, by the same steps."""
        return self._begin(url, media_io, fetch_timeout).result()

    async def load_from_url_async(
        self, url: str, media_io: MediaIO[_M], *, fetch_timeout: int | None = None
    ) -> _M:
        """Load for the server; ends where the caller is cancelled."""
        return await asyncio.wrap_future(self._begin(url, media_io, fetch_timeout))

    def _begin(self, url: str, media_io: MediaIO[_M], timeout_s: float | None) -> Future[_M]:
        load = self._load(url, media_io, timeout_s)
        return asyncio.run_coroutine_threadsafe(load, _loop())  # hands the context on

    async def _load(self, url: str, media_io: MediaIO[_M], timeout_s: float | None) -> _M:
        """Load, or refuse with a text that says nothing of us.

        The first refusal answers a request: its other pictures are let go of, and not counted.
        """
        request, this = current() or RequestContext(), asyncio.current_task()
        request.loads.add(this)
        what = _OTHERS.get(type(media_io), "picture")
        try:
            if not isinstance(media_io, ImageMediaIO | VideoMediaIO):
                raise RefusedError("this server takes text, pictures and videos only")
            if (remote := self._remote(url)) is None:
                data = await asyncio.to_thread(self._local, url)
            else:
                data = await self._fetch(remote, timeout_s)
            if isinstance(media_io, ImageMediaIO):
                return cast(_M, await self._decode(data, media_io, request))
            video_io = cast(VideoMediaIO, media_io)
            return cast(_M, await self._decode_video(data, video_io, request))
        except asyncio.CancelledError:  # vLLM raises what the first of them in order ended by
            if request.refusal is None:
                raise
            raise request.refusal from None
        except Exception as error:  # parsers raise anything, MemoryError included
            _log.debug("loading failed: %s", type(error).__name__)
            if request.refusal is None:
                request.refusal = error
                if not isinstance(error, GracefulHTTPError):  # which is counted as ``busy``
                    REJECTED.labels("media").inc()
                    why = str(error) if isinstance(error, RefusedError) else "it could not be read"
                    request.refusal = VLLMValidationError(
                        f"the {what} is refused: {why}",
                        parameter="image_url" if what == "picture" else f"{what}_url",
                    )
            for other in request.loads - {this}:
                other.cancel()
            raise request.refusal from None
        finally:
            request.loads.discard(this)

    def _remote(self, url: str) -> yarl.URL | None:
        """Return a web address that may be fetched; None for ``data:`` and ``file:``.

        It is read once, by the library that connects: two readers that disagree about the host
        were CVE-2026-24779.
        """
        scheme = url[:5].lower()
        if scheme in ("data:", "file:"):
            return None
        if not scheme.startswith("http"):
            raise RefusedError("its URL is neither data:, http: or https:, nor file:")
        if not self.allowed_media_domains:
            raise RefusedError(
                "this server fetches no URL (--allowed-media-domains is not set); send it as "
                "data:TYPE;base64,..."
            )
        if "\\" in url or any(ord(char) <= 32 or ord(char) >= 127 for char in url):
            raise RefusedError("its URL holds characters that have to be percent-encoded")
        remote = yarl.URL(url)
        allowed = allowed_hosts(self.allowed_media_domains)
        if remote.user is not None or remote.raw_host not in allowed:
            raise RefusedError("its URL is not of a domain that this server fetches from")
        return remote

    def _local(self, url: str) -> bytes:
        """Return a file, or what a ``data:`` URL holds, whatever it says that this is."""
        if url[:5].lower() == "file:":
            return self._file(url)
        limit = self.settings.max_data_url_bytes
        if len(url) > limit:
            raise RefusedError(f"its data URL is {len(url)} bytes long, allowed are {limit}")
        header, comma, text = url[5:].partition(",")
        if not comma or header.lower().rpartition(";")[2].strip() != "base64":
            raise RefusedError("its data URL is not of the form data:TYPE;base64,DATA")
        data = text.encode("ascii", "replace").translate(None, b" \t\r\n\v\f")  # lines are common
        try:
            return pybase64.b64decode(data, validate=True)
        except ValueError:
            text = data.decode()
            why = f"it has {len(text)} characters, needed a multiple of 4, filled up with ="
            if wrong := re.search("[^A-Za-z0-9+/=]", text):
                why = f"it holds {wrong[0]!a}{_NOT_BASE64.get(wrong[0], '')}"
            raise RefusedError(f"what follows ;base64, is not base64: {why}") from None

    def _file(self, url: str) -> bytes:
        root, parts = self.allowed_local_media_path, urlsplit(url)
        if root is None:
            raise RefusedError("this server reads no files (--allowed-local-media-path is not set)")
        path = Path(unquote(parts.path)).resolve()
        if parts.netloc not in ("", "localhost") or root not in path.parents or not path.is_file():
            raise RefusedError("no such file below --allowed-local-media-path")
        if path.stat().st_size > _download_limit():
            raise RefusedError(f"its file is longer than {_download_limit()} bytes")
        return path.read_bytes()

    async def _fetch(self, url: yarl.URL, timeout_s: float | None) -> bytes:
        """Fetch without proxy, redirects, cookies, unpacking or retries; addresses are checked."""
        connector = aiohttp.TCPConnector(socket_factory=public_socket)
        limit, parts, received = _download_limit(), list[bytes](), 0
        try:
            async with (
                aiohttp.ClientSession(
                    connector=connector,
                    trust_env=False,  # a proxy would connect for us, to any address
                    auto_decompress=False,
                    headers={"Accept-Encoding": "identity", "User-Agent": "era-vllm"},
                    timeout=aiohttp.ClientTimeout(total=timeout_s),
                ) as session,
                session.get(url, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise RefusedError(f"its URL answers {response.status}, needed 200")
                async for part in response.content.iter_chunked(_CHUNK):
                    received += len(part)
                    if received > limit:
                        raise RefusedError(f"its URL gives more than {limit} bytes")
                    parts.append(part)
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is one
            _log.debug("fetching failed: %s", type(error).__name__)
            why = "its URL could not be fetched from a public address in time"
            raise RefusedError(why) from None
        return b"".join(parts)

    async def _decode(
        self, data: bytes, media_io: ImageMediaIO, request: RequestContext
    ) -> MediaWithBytes[Image]:
        """Return what ``media_io.load_bytes`` would."""
        settings, mode, behind = self.settings, media_io.image_mode, media_io.rgba_background_color
        formats, most = settings.image_formats, settings.max_image_pixels
        wanted = Wanted(formats, ALLOWED_IMAGE_FORMATS, most, mode, behind)
        count, limit_s = partial(self._count, request), settings.decode_timeout_s
        picture, changed = await _decoders().decode(data, wanted, count, self._hold, limit_s)
        made = {"image_mode": mode, "rgba_background_color": behind} if changed else None
        return MediaWithBytes(picture, data, made)

    async def _decode_video(
        self, data: bytes, media_io: VideoMediaIO, request: RequestContext
    ) -> MediaWithBytes[object]:
        """Return what ``media_io.load_bytes`` would: frames, and what is known of them."""

        async def take(frames: object, pixels: int) -> None:
            self._count(request, pixels)
            self._hold(frames, pixels)

        settings = self.settings
        bounds = VideoBounds(
            seconds=settings.max_video_seconds,
            frames=settings.max_video_frames,
            frame_pixels=settings.max_frame_pixels,
            decode_s=settings.video_timeout_s,
        )
        return await videos.load(data, media_io, bounds, take)

    def _hold(self, picture: object, pixels: int) -> None:
        _HELD.take(picture, pixels, _REQUESTS * self.settings.max_request_pixels)

    def _count(self, request: RequestContext, pixels: int) -> None:
        request.pixels += pixels
        if request.pixels > self.settings.max_request_pixels:
            raise RefusedError(
                f"with it the request's pictures have {request.pixels} pixels, allowed are "
                f"{self.settings.max_request_pixels} in all; send fewer or smaller ones"
            )


class Held:
    """Counts the pixels of all pictures and frames that are decoded, until nobody holds them.

    Pictures are let go of in any thread, also while ``take`` runs: hence the queue.
    """

    def __init__(self) -> None:
        self._pixels = 0
        self._given_back = deque[int]()

    def take(self, picture: object, pixels: int, most: int) -> None:
        """Count a picture's pixels, before it takes memory.

        Raises:
            GracefulHTTPError: with it all have more than ``most``; a 503.
        """
        while self._given_back:
            self._pixels -= self._given_back.popleft()
        if self._pixels + pixels > most:
            raise busy("the pictures of the requests under way fill the memory that they may have")
        self._pixels += pixels
        weakref.finalize(picture, self._given_back.append, pixels).atexit = False


_HELD: Final = Held()


@lru_cache(1)
def _loop() -> asyncio.AbstractEventLoop:
    """Return the loop of media, in a thread of its own; callers have others, or none."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="media", daemon=True).start()
    return loop


@lru_cache(1)
def _decoders() -> Decoders:
    """Return those of this process, as many as vLLM takes threads for it."""
    return Decoders(envs.VLLM_MEDIA_LOADING_THREAD_COUNT)


@lru_cache(1)
def _settings(variables: tuple[tuple[str, str], ...]) -> ServerSettings:
    """Parse them once, not for each message that vLLM makes a connector for: that takes 1 ms."""
    return ServerSettings.parse()


def _download_limit() -> int:
    return envs.VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB * 2**20
