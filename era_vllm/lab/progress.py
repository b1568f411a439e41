"""Progress lines for what takes more than a few seconds: live on a terminal, sparse in a log."""

import sys
from typing import Final

from tqdm import tqdm

LOG_INTERVAL_S: Final = 10.0
_TERMINAL_INTERVAL_S: Final = 0.5


def interval_s() -> float:
    """Return how often a line should be written: a log keeps each of them."""
    return _TERMINAL_INTERVAL_S if sys.stderr.isatty() else LOG_INTERVAL_S


def bar(total: int, description: str, unit: str) -> "tqdm[None]":
    """Return a progress bar on standard error; a context manager."""
    return tqdm(total=total, desc=description, unit=unit, mininterval=interval_s())
