"""What is said on standard error while a page is made: progress, and nothing of vLLM's log."""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from tqdm import tqdm

QUIET: Final[Mapping[str, str]] = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment of a process that starts an engine and prints a page of its own."""
IN_PROCESS: Final[Mapping[str, str]] = {**QUIET, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The same for engines that live in the process itself."""
LOG_INTERVAL_S: Final = 10.0
_TERMINAL_INTERVAL_S: Final = 0.5


@contextmanager
def muted() -> Iterator[None]:
    """Hide whatever this process writes, its C++ parts included.

    Mutates: file descriptors 1 and 2, put back at the end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def progress(text: str) -> None:
    """Say, beside the page, what is being waited for."""
    print(f"... {text}", file=sys.stderr, flush=True)


def interval_s() -> float:
    """Return how often a line should be written: a log keeps each of them."""
    return _TERMINAL_INTERVAL_S if sys.stderr.isatty() else LOG_INTERVAL_S


def bar(total: int, description: str, unit: str) -> "tqdm[None]":
    """Return a progress bar on standard error; a context manager."""
    return tqdm(total=total, desc=description, unit=unit, mininterval=interval_s())
