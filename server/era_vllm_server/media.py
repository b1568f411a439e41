"""vLLM's media connector, chosen by ``VLLM_MEDIA_CONNECTOR``: what a client's URL may make us do.

A picture comes in the request (``data:``), from one of ``--allowed-media-domains`` at a public
address, or from below ``--allowed-local-media-path``; its size is checked before it is decoded, and
so is that of all of a request's pictures, and of all requests': vLLM decodes before it admits.
Whatever else it is, the answer is a 400 with a text of ours: what PIL, the resolver or the file
system say may hold addresses, names and paths. Leaves out who may ask at all (``guard``).

Upstream: vllm/multimodal/media/connector.py ``MediaConnector``, whose two ways to load a URL are
replaced (0.32.0). Its cache of downloads (``VLLM_MEDIA_CACHE``) is not used.
"""

import asyncio
import logging
import os
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import lru_cache
from http import HTTPStatus
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Final, TypeVar
from urllib.parse import unquote, urlsplit

import aiohttp
import pybase64
import vllm.envs as envs
import yarl
from PIL.Image import DecompressionBombError
from vllm.exceptions import GracefulHTTPError, VLLMError, VLLMValidationError
from vllm.multimodal.image import open_image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.base import MediaIO
from vllm.multimodal.media.connector import global_thread_pool
from vllm.multimodal.media.image import ImageMediaIO

from era_vllm.vllm_plugin.requests import Scope, current
from era_vllm_server.addresses import allowed_hosts, public_socket
from era_vllm_server.front import CONNECTOR
from era_vllm_server.metrics import REJECTED
from era_vllm_server.settings import PREFIX, ServerSettings

_M = TypeVar("_M")
_MAX_ASPECT: Final = 200
"""Width by height or the other way round. Processors scale the short side up, and what they make of
30000 x 1 pixels does not fit into memory. Source: the bound of Qwen2-VL's own processor."""
_CHUNK: Final = 2**16
_REQUESTS: Final = 8
"""So many of the largest requests may hold their pictures at once. Pillow takes 4 bytes a pixel."""
_log = logging.getLogger(__name__)


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class GuardedConnector(MediaConnector):
    """Loads what a URL names, or refuses."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        variables = tuple((name, value) for name, value in os.environ.items() if PREFIX in name)
        self.settings = _settings(variables)
        self.held = _held()
        self.formats = {name.strip().upper() for name in self.settings.image_formats.split(",")}

    def load_from_url(
        self, url: str, media_io: MediaIO[_M], *, fetch_timeout: int | None = None
    ) -> _M:
        """Load for a caller without a loop, by the same steps."""
        load = self.load_from_url_async(url, media_io, fetch_timeout=fetch_timeout)
        with ThreadPoolExecutor(1) as apart:  # the caller's thread may run a loop
            return apart.submit(copy_context().run, asyncio.run, load).result()

    async def load_from_url_async(
        self, url: str, media_io: MediaIO[_M], *, fetch_timeout: int | None = None
    ) -> _M:
        """Load for the server; files and decoding in vLLM's pool of threads."""
        run = asyncio.get_running_loop().run_in_executor
        request = current() or Scope()  # threads of the pool do not see it
        with _refusing(request):
            if (remote := self._remote(url)) is None:
                return await run(global_thread_pool, self._local, url, media_io, request)
            data = await self._fetch(remote, fetch_timeout)
            return await run(global_thread_pool, self._decode, data, media_io, request)

    def _remote(self, url: str) -> yarl.URL | None:
        """Return a web address that may be fetched; None for ``data:`` and ``file:``.

        It is read once, by the library that connects: two readers that disagree about the host
        were CVE-2026-24779.
        """
        scheme = url[:5].lower()
        if scheme in ("data:", "file:"):
            return None
        if not scheme.startswith("http"):
            raise refused("its URL is neither data:, http: or https:, nor file:")
        if not self.allowed_media_domains:
            raise refused(
                "this server fetches no URL (--allowed-media-domains is not set); send it as "
                "data:image/...;base64,..."
            )
        if "\\" in url or any(ord(char) <= 32 or ord(char) >= 127 for char in url):
            raise refused("its URL holds characters that have to be percent-encoded")
        remote = yarl.URL(url)
        allowed = allowed_hosts(self.allowed_media_domains)
        if remote.user is not None or remote.raw_host not in allowed:
            raise refused("its URL is not of a domain that this server fetches from")
        return remote

    def _local(self, url: str, media_io: MediaIO[_M], request: Scope) -> _M:
        if url[:5].lower() == "file:":
            return self._decode(self._file(url), media_io, request)
        limit = self.settings.max_data_url_bytes
        if len(url) > limit:
            raise refused(f"its data URL is {len(url)} bytes long, allowed are {limit}")
        header, comma, data = url[5:].partition(",")
        kind, *parameters = header.lower().split(";")
        if not comma or not parameters or parameters[-1] != "base64":
            raise refused("its data URL is not of the form data:TYPE;base64,DATA")
        if not isinstance(media_io, ImageMediaIO):
            return media_io.load_base64(kind, data)
        if not kind.startswith("image/"):
            raise refused("its data URL does not say image/...")
        return self._decode(pybase64.b64decode(data, validate=True), media_io, request)

    def _file(self, url: str) -> bytes:
        root, parts = self.allowed_local_media_path, urlsplit(url)
        if root is None:
            raise refused("this server reads no files (--allowed-local-media-path is not set)")
        path = Path(unquote(parts.path)).resolve()
        if parts.netloc not in ("", "localhost") or root not in path.parents or not path.is_file():
            raise refused("no such file below --allowed-local-media-path")
        if path.stat().st_size > _download_limit():
            raise refused(f"its file is longer than {_download_limit()} bytes")
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
                    raise refused(f"its URL answers {response.status}, needed 200")
                async for part in response.content.iter_chunked(_CHUNK):
                    received += len(part)
                    if received > limit:
                        raise refused(f"its URL gives more than {limit} bytes")
                    parts.append(part)
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is one
            _log.debug("fetching failed: %s", type(error).__name__)
            raise refused("its URL could not be fetched from a public address in time") from None
        return b"".join(parts)

    def _decode(self, data: bytes, media_io: MediaIO[_M], request: Scope) -> _M:
        if not isinstance(media_io, ImageMediaIO):
            return media_io.load_bytes(data)
        pixels, held = self._pixels(data), self.held
        held.take(request, pixels, self.settings.max_request_pixels)
        try:
            loaded = media_io.load_bytes(data)
        except BaseException:
            held.give_back(pixels)
            raise
        weakref.finalize(loaded.media, held.give_back, pixels).atexit = False
        return loaded

    def _pixels(self, data: bytes) -> int:
        """Return how many a picture has, of one that may be decoded."""
        try:
            with open_image(BytesIO(data)) as picture:  # reads the header only
                kind, (width, height) = picture.format, picture.size
        except DecompressionBombError:
            raise refused("it has more pixels than Pillow opens") from None
        most = self.settings.max_image_pixels
        if kind not in self.formats:
            raise refused(f"its format is {kind}, allowed are {self.settings.image_formats}")
        if width * height > most:
            raise refused(f"it has {width} x {height} pixels, allowed are {most} in all")
        if max(width, height) > _MAX_ASPECT * min(width, height):
            raise refused(f"it has {width} x {height} pixels, allowed is 1 : {_MAX_ASPECT}")
        return width * height


class Held:
    """Counts the pixels of all pictures that are decoded, from before until nobody holds them.

    Pictures are let go of in any thread, also while ``take`` runs: hence the queue.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._pixels = 0
        self._given_back = deque[int]()

    def take(self, request: Scope, pixels: int, most: int) -> None:
        """Count a picture that is to be decoded.

        Raises:
            VLLMValidationError: with it the request's pictures have more than ``most``.
            GracefulHTTPError: all requests' have more than ``_REQUESTS`` times as many; a 503.

        Mutates: request, whose further pictures are refused with it.
        """
        with self._lock:
            while self._given_back:
                self._pixels -= self._given_back.popleft()
            request.pixels += pixels
            if request.pixels > most:
                raise refused(
                    f"with it the request's pictures have {request.pixels} pixels, allowed are "
                    f"{most} in all; send fewer or smaller ones"
                )
            if self._pixels + pixels > _REQUESTS * most:
                raise GracefulHTTPError(
                    "the pictures of the requests under way fill the memory that they may have; "
                    "send the request again",
                    HTTPStatus.SERVICE_UNAVAILABLE,
                )
            self._pixels += pixels

    def give_back(self, pixels: int) -> None:
        """Count a picture that is gone."""
        self._given_back.append(pixels)


@lru_cache(1)
def _held() -> Held:
    """Return the one of this process, which has one pool of threads too."""
    return Held()


@lru_cache(1)
def _settings(variables: tuple[tuple[str, str], ...]) -> ServerSettings:
    """Parse them once, not for each message that vLLM makes a connector for: that takes 1 ms."""
    return ServerSettings.parse()


def refused(why: str) -> VLLMValidationError:
    """Return the error of a picture that is not served."""
    return VLLMValidationError(f"the picture is refused: {why}", parameter="image_url")


@contextmanager
def _refusing(request: Scope) -> Iterator[None]:
    """Turn whatever a decoder or parser raises into a refusal that says nothing of us.

    A request is counted once, however many of its pictures are refused.
    """
    try:
        yield
    except GracefulHTTPError:  # which the guard counts
        raise
    except VLLMError:
        _count(request)
        raise
    except Exception as error:  # decoders raise anything, MemoryError and struct.error included
        _log.debug("loading failed: %s", type(error).__name__)
        _count(request)
        raise refused("it could not be read; is it damaged, or not a picture?") from None


def _count(request: Scope) -> None:
    REJECTED.labels("media").inc(not request.refused)
    request.refused = True


def _download_limit() -> int:
    return envs.VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB * 2**20
