"""The processes in which pictures and videos are decoded, so that a decoding can be ended.

One is killed where its file takes too long, or the task that waits for it is cancelled: the
client left, or the request's deadline came. They end with their parent. Pixels come back through
memory that both have, and nothing that a process says is run. What it does is in ``pictures`` and
``videos`` of ``era_vllm``; how a video's is talked to, in ``videos``.
"""

import asyncio
import fcntl
import json
import logging
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from http import HTTPStatus
from typing import Any, Final

from PIL.Image import Image, new
from vllm.exceptions import GracefulHTTPError

from era_vllm.pictures import RefusedError, Wanted

_COMMAND: Final = (sys.executable, "-P", "-W", "ignore", "-m", "era_vllm.pictures")
_PASSED_ON: Final = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LANG", "LC_ALL", "TMPDIR")
"""Variables; keys and tokens are none of a decoder's business."""
_ENVIRONMENT: Final = {"PILLOW_BLOCKS_MAX": "4"}
"""Of Pillow's memory 64 MB are kept for the next picture, as ``_KEPT`` is: new pages cost much."""
_START_S: Final = 60.0
"""For a process to start, which takes 0.2 s."""
_KEPT: Final = 2**26
"""Bytes of the memory that both have."""
Count = Callable[[int], object]
Hold = Callable[[Image, int], object]
"""Of a picture and its pixels."""
_log = logging.getLogger(__name__)


def busy(why: str) -> GracefulHTTPError:
    """Return the error of a picture or video that may be served later; a 503."""
    return GracefulHTTPError(f"{why}; send the request again", HTTPStatus.SERVICE_UNAVAILABLE)


class Decoders:
    """All of them; one is started when a picture would have to wait for the others.

    Args:
        count: Most of them.
        what: They decode.
        command: Of one, without its two files; None = that of pictures.
        environment: What it has beyond paths and the language.
    """

    def __init__(
        self,
        count: int,
        what: str = "picture",
        command: tuple[str, ...] | None = None,
        environment: Mapping[str, str] = _ENVIRONMENT,
    ) -> None:
        self._what, self._command, self._environment = what, command, environment
        self._free = asyncio.LifoQueue[Process | None]()
        for _ in range(count):
            self._free.put_nowait(None)

    async def decode(
        self, data: bytes, wanted: Wanted, count: Count, hold: Hold, limit_s: float
    ) -> tuple[Image, bool]:
        """Return a picture, and whether its mode was changed.

        Args:
            count: Is told the number of pixels before they are decoded; may raise.
            hold: Is given the picture before it takes memory; may raise.
            limit_s: How long it may wait for others, and then be decoded.

        Raises:
            RefusedError: it is not served.
            GracefulHTTPError: no process was free in time, or none could be started; a 503.
        """
        async with self.lent(limit_s) as process:
            answer = await process.ask(data, wanted, count)
            picture = new(answer["mode"], tuple(answer["size"]), None)  # no memory is touched yet
            hold(picture, picture.width * picture.height)
            process.fill(picture, answer["length"])
            return picture, answer["changed"]

    @asynccontextmanager
    async def lent(self, limit_s: float) -> AsyncIterator["Process"]:
        """Give a process that is free; it is killed where it is still at work in the end.

        Args:
            limit_s: How long to wait for one, and then how long it may be used.

        Raises:
            RefusedError: time was up, or the process has ended.
            GracefulHTTPError: none was free in time, or none could be started; a 503.
        """
        try:
            async with asyncio.timeout(limit_s):
                process = await self._free.get()
        except TimeoutError:
            raise busy(f"the {self._what} waited {limit_s:g} s for others to be decoded") from None
        if process is not None and process.has_ended():  # meanwhile, by the system perhaps
            process = process.end()
        started = process is not None
        try:
            if process is None:
                process = Process(self._command or _COMMAND, self._environment)
                async with asyncio.timeout(_START_S):
                    await process.answer()
            started = True
            async with asyncio.timeout(limit_s):
                yield process
        except OSError as error:  # TimeoutError is one
            if not started:
                _log.exception("no process for %ss could be started", self._what)
                why = f"no process could be started that decodes the {self._what}"
                raise busy(why) from None
            why = "decoding it ended the process; is it damaged?"
            if isinstance(error, TimeoutError):
                why = f"it takes too long to decode, allowed are {limit_s:g} s"
            raise RefusedError(why) from None
        finally:
            if process is not None and process.working:
                process = process.end()
            self._free.put_nowait(process)


class Process:
    """One process, and the memory that both have."""

    def __init__(self, command: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self._memory = os.memfd_create("picture", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        seals = fcntl.F_SEAL_SHRINK  # else reading a mapped page could end us
        fcntl.fcntl(self._memory, fcntl.F_ADD_SEALS, seals)
        passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        with ExitStack() as undo:
            undo.callback(os.close, self._memory)
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.enter_context(self._control)
            self._control.setblocking(False)
            shared = theirs.fileno(), self._memory
            with theirs:
                self._popen = subprocess.Popen(
                    (*command, *map(str, shared)),
                    pass_fds=shared,
                    env=passed_on | dict(environment),
                )
            undo.pop_all()
        self.working = True

    def has_ended(self) -> bool:
        """Tell whether it is there no more."""
        return self._popen.poll() is not None

    async def ask(self, data: bytes, wanted: Wanted, count: Count) -> dict[str, Any]:
        """Have a picture decoded; return its mode, its size, and whether the mode was changed."""
        self.working = True
        os.pwrite(self._memory, data, 0)
        message = json.dumps((len(data), wanted)).encode()
        await asyncio.get_running_loop().sock_sendall(self._control, message)
        if "pixels" in (answer := await self.answer()):
            self.working = True
            count(answer["pixels"])
            await asyncio.get_running_loop().sock_sendall(self._control, b"1")
            answer = await self.answer()
        return answer

    async def answer(self) -> dict[str, Any]:
        """Return what it says.

        Raises:
            RefusedError: it does not serve the picture.
            ConnectionResetError: it has ended.
        """
        if not (message := await asyncio.get_running_loop().sock_recv(self._control, 2**16)):
            raise ConnectionResetError
        self.working = False
        answer = json.loads(message)
        if "refused" in answer:
            raise RefusedError(answer["refused"])
        return answer

    def fill(self, picture: Image, length: int) -> None:
        """Put the pixels into a picture."""
        with mmap.mmap(self._memory, length) as pixels:
            picture.frombytes(pixels)
        self.trim(length)

    def trim(self, length: int) -> None:
        """Give back memory of which so much was used, if that is more than is kept."""
        if length > _KEPT:
            with mmap.mmap(self._memory, length) as used:
                used.madvise(mmap.MADV_REMOVE)

    def files(self) -> tuple[socket.socket, int]:
        """Return copies of both for another thread, which closes them; ours end with it."""
        return self._control.dup(), os.dup(self._memory)

    def end(self) -> None:
        """Kill it."""
        self._popen.kill()
        self._popen.wait()
        self._control.close()
        os.close(self._memory)
