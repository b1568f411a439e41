"""Errors that a user can act on. Each text says what, got, allowed and the next step."""

import difflib
from collections.abc import Iterable


class EraError(Exception):
    """Base of every error that era_vllm raises on purpose."""


class ConfigError(EraError, ValueError):
    """A setting is unknown, malformed or out of range."""


class UnsupportedError(EraError, ValueError):
    """A valid combination of settings that this version cannot serve; raised at start-up."""


class PolicyError(EraError, ValueError):
    """A pruning policy was given tokens that it cannot work on."""


class CacheError(EraError, RuntimeError):
    """The KV cache does not hold what the bias store expects."""


def unknown_name(what: str, got: str, allowed: Iterable[str]) -> str:
    """Text for an unknown name, with the nearest allowed one.

    Args:
        what: The kind of name, e.g. ``"era setting"``.
        got: The name as the user wrote it.
        allowed: Every name that would have been accepted.
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {got!r}{hint} (allowed: {', '.join(names) or 'none'})"
