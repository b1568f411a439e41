"""Keep vLLM's log off the screen, and what it said at hand for when it fails."""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from era_vllm.errors import EraError

QUIET: Final[Mapping[str, str]] = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment of a process that starts an engine and prints a page of its own."""


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


def reason(error: BaseException) -> str:
    """Return one line about an error: ours if one is in its chain, else the innermost."""
    if own := ours(error):
        return str(own)
    innermost = _chain(error)[-1]
    lines = str(innermost).strip().splitlines() or ["no text"]
    return f"{type(innermost).__name__}: {lines[0][:300]}"


def ours(error: BaseException) -> EraError | None:
    """Return the error of ours that another library has wrapped, if there is one."""
    return next((link for link in _chain(error) if isinstance(link, EraError)), None)


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain
