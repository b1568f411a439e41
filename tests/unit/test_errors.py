"""Error texts name the nearest allowed name, and children can be caught as built-in errors."""

import pytest

from era_vllm.errors import (
    CacheError,
    ConfigError,
    EraError,
    PolicyError,
    UnsupportedError,
    unknown_name,
)


def test_nearest_name_and_all_allowed_ones() -> None:
    text = unknown_name("fruit", "aple", ["pear", "apple"])
    assert text == "unknown fruit 'aple'; did you mean 'apple'? (allowed: apple, pear)"
    assert unknown_name("fruit", "zzz", ["pear"]) == "unknown fruit 'zzz' (allowed: pear)"
    assert unknown_name("fruit", "zzz", []) == "unknown fruit 'zzz' (allowed: none)"


@pytest.mark.parametrize("error", [ConfigError, UnsupportedError, PolicyError, CacheError])
def test_all_are_era_errors(error: type[EraError]) -> None:
    assert issubclass(error, EraError)
    assert issubclass(error, RuntimeError if error is CacheError else ValueError)
