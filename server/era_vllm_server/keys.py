"""API keys: read once from a file, kept as digests, compared in constant time.

Which keys hold is decided here, for the launcher and for every API server alike. Leaves out which
path asks for which key (``middleware.auth``).
"""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.types import Scope

from era_vllm.errors import ConfigError
from era_vllm_server.settings import ServerSettings


class Keys(tuple[bytes, ...]):
    """SHA-256 of each key; where there are none everybody may pass."""

    __slots__ = ()

    @classmethod
    def of(cls, keys: Iterable[str]) -> "Keys":
        """Take keys as they are written."""
        return cls(_digest(key.encode()) for key in keys)

    @classmethod
    def read(cls, file: Path) -> "Keys":
        """Read one key a line; empty lines and lines that begin with # are left out.

        Raises:
            ConfigError: no such file, no key in it, or a key with a space in it.
        """
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"keys file {file}: cannot be read ({type(error).__name__})"
            ) from None
        numbered = [(at, line) for at, line in enumerate(lines, 1) if line and line[0] != "#"]
        if not numbered:
            raise ConfigError(
                f"keys file {file}: holds no key, needed at least one; write one a line, or leave "
                "the setting out to serve without keys"
            )
        for at, key in numbered:
            if len(key.split()) > 1:
                raise ConfigError(
                    f"keys file {file}, line {at}: a key has no spaces; comments begin with # on a "
                    "line of their own"
                )
        return cls.of(key for _, key in numbered)

    def holder(self, presented: Iterable[bytes]) -> bytes | None:
        """Return the first of the presented keys that is one of ours.

        Every pair is compared, and digests in constant time: how long it takes tells nothing.
        """
        found = None
        for key in presented:
            digest = _digest(key)
            matches = sum([hmac.compare_digest(digest, own) for own in self])
            found = key if matches and found is None else found
        return found


def keys_of(settings: ServerSettings, theirs: Keys) -> tuple[Keys, Keys]:
    """Return the API keys and those of ``/metrics``; ``theirs`` are vLLM's own, of its flag.

    Raises:
        ConfigError: keys from two places, a file that is no use, or names of pictures without keys.
    """
    api = theirs
    if settings.api_keys_file is not None:
        if theirs:
            raise ConfigError(
                "keys come from --era-api-keys-file and from vLLM's --api-key or VLLM_API_KEY, "
                "needed one of the two; write them all into the file"
            )
        api = Keys.read(settings.api_keys_file)
    if settings.allow_image_uuid and not api:
        raise ConfigError(
            "--era-allow-image-uuid: pictures' names are kept apart by API key, and there is "
            "none; set --era-api-keys-file, or leave it out"
        )
    file = settings.metrics_key_file
    return api, api if file is None else Keys.read(file)


def presented(scope: Scope) -> list[bytes]:
    """Return the keys that a request brings: as bearer token, or as Anthropic's clients do."""
    keys = list[bytes]()
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            keys += [key.strip()] if scheme.lower() == b"bearer" else []
        elif name == b"x-api-key":
            keys.append(value.strip())
    return keys


def as_bearer(scope: Scope, key: bytes) -> Scope:
    """Return a request that brings a key as its only bearer token, which is where vLLM looks."""
    others = [header for header in scope["headers"] if header[0] != b"authorization"]
    return {**scope, "headers": [*others, (b"authorization", b"Bearer " + key)]}


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
