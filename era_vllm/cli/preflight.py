"""What is tried before anything is loaded: numbers, a server's address, folders written to.

vLLM meets a port that is taken, or a full disk, when the model is there or half compiled, in a
traceback. The plain `vllm serve` line that is printed goes without.
"""

import argparse
import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from era_vllm.errors import ConfigError, UnsupportedError

_NEEDED_BYTES: Final = 8 << 20
"""Written for a try: what vLLM compiles for a small model."""
_FOLDERS: Final = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def check_address(host: str | None, port: int, uds: str | None) -> None:
    """Listen where the server will, for a moment.

    Raises:
        ConfigError: that cannot be done.
    """
    kind = socket.AF_INET
    with suppress(OSError):  # a name that has no address is said below
        kind = socket.getaddrinfo(host, port)[0][0] if host else kind
    flag, next_step = f"--port {port}", "stop what listens there, or choose another --port"
    if host:
        flag = f"--host {host} {flag}"
    if uds:
        kind, flag = socket.AF_UNIX, f"--uds {uds}"
        next_step = "choose another path, or remove the file if no server uses it"
    with socket.socket(kind) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM: past connections
        try:
            tried.bind(uds or (host or "", port))
            tried.listen()
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"{flag}: cannot listen there ({why}); {next_step}") from error
        if uds:
            os.unlink(uds)


def check_folders(cache: str) -> None:
    """Write a few megabytes to each folder that vLLM keeps something in, and remove them.

    Args:
        cache: vLLM's own.

    Raises:
        ConfigError: one is read-only or full.
    """
    named = {name: os.environ[name] for name in _FOLDERS if name in os.environ}
    try:
        folders = {"VLLM_CACHE_ROOT": cache, "TMPDIR": tempfile.gettempdir(), **named}
    except OSError as error:
        raise ConfigError(f"TMPDIR: {error.strerror}; name a folder that can be written") from error
    for name, folder in folders.items():
        check_folder(
            Path(folder),
            f"{name}: {folder} cannot take {_NEEDED_BYTES >> 20} MiB",
            f"make room there, or set {name} to a folder that can be written",
            _NEEDED_BYTES,
        )


def check_folder(folder: Path, trouble: str, next_step: str, size: int = 0) -> None:
    """Make a folder and write there for a moment: now, rather than after minutes of work.

    Args:
        trouble: What the error says first; the system's reason comes behind it.
        next_step: How it ends.
        size: Bytes.

    Raises:
        ConfigError: it is a file, read-only or full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as tried:
            tried.write(bytes(size))
    except OSError as error:
        raise ConfigError(f"{trouble} ({error.strerror}); {next_step}") from error


def check_out(out: Path, names: Sequence[str] = ()) -> None:
    """Refuse a folder that cannot be written to, and a machine that cannot draw, before the work.

    Args:
        names: Files that will be written there.

    Raises:
        ConfigError: the folder, or what stands in a file's place.
        UnsupportedError: matplotlib is not installed, and one is a PNG.
    """
    if any(name.endswith(".png") for name in names) and find_spec("matplotlib") is None:
        raise UnsupportedError("needs the package matplotlib: pip install matplotlib (or [lab])")
    check_folder(out, f"--out: the folder {str(out)!r} cannot be written to", "name another")
    for name in names:
        if (out / name).exists() and not (out / name).is_file():
            raise ConfigError(f"--out: {str(out / name)!r} is no file; name another folder")


def check_least(arguments: argparse.Namespace, **least: float) -> None:
    """Refuse flags whose numbers are too small.

    Raises:
        ConfigError: with the least that is allowed.
    """
    for name, lowest in least.items():
        if (given := getattr(arguments, name)) is not None and given < lowest:
            flag = name.replace("_", "-")
            shown = f"{given:g}" if isinstance(given, float) else given
            raise ConfigError(f"--{flag}: got {shown}, allowed: {lowest:g} or more")
