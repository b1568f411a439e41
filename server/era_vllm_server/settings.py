"""What the front does: each setting is a flag of ``era-vllm serve`` and an ``ERA_`` variable.

The flag wins. All server processes read the variables, which ``with_front`` sets from the flags.
Leaves out what decides which tokens are kept: that is ``EraConfig``, which travels with the model.
"""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError, unknown_name

PREFIX: Final = "ERA_"
NOT_OURS: Final = frozenset(
    {
        *("ERA_VENV", "ERA_PYTHON", "ERA_INSTALL", "ERA_TORCH_INDEX", "ERA_BIND"),
        *("ERA_MODEL", "ERA_MODEL_NAME", "ERA_MODEL_ARGS"),
        "ERA_ALLOW_UNTESTED_VLLM",
    }
)
"""Variables of the scripts in ``deploy``, and of the version check."""
_SERVICE: Final = re.compile(
    r"ERA_(\w+_)?(SERVICE_HOST=|SERVICE_PORT(_\w+)?=|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?=\w+://"
    r"|PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)=)"
)
"""Variables, with their values, of a Service whose name begins with ``era``: Kubernetes puts them
into every pod of its namespace. A port's alone holds an address: ``ERA_VLLM_PORT=tcp://...``."""


Number = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=1024)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SecondsOrNone = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ServerSettings(BaseSettings):
    """Settings of the front; every field has a flag ``--era-<name>``, its docstring is the help."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, use_attribute_docstrings=True)

    api_keys_file: Path | None = None
    """keys that may use the server, one a line (default: no key is asked for)"""
    metrics_key_file: Path | None = None
    """key of /metrics alone (default: an API key, where there are any)"""
    max_body_bytes: Bytes = 32 * 2**20
    """largest request body; more is a 413"""
    max_bodies_bytes: Bytes = 2**30
    """bodies of all requests under way together; more is a 503"""
    max_data_url_bytes: Bytes = 20 * 2**20
    """longest base64 picture, as sent; more is a 400"""
    max_image_pixels: Number = 2**25
    """largest picture, checked before it is decoded; more is a 400"""
    max_request_pixels: Number = 2**27
    """pixels of all pictures and sampled frames of a request, which are decoded before it is
    admitted; more is a 400; all requests together may hold eight times as many, more is a 503"""
    image_formats: Annotated[str, Field(min_length=1)] = "PNG,JPEG,MPO,WEBP,GIF,BMP,AVIF"
    """picture formats served, by Pillow's names (MPO: JPEG of many phones)"""
    decode_timeout_s: Seconds = 10.0
    """how long a picture is decoded, more is a 400, and waits to be, more is a 503"""
    max_video_seconds: Seconds = 600.0
    """longest video; more is a 400"""
    max_video_frames: Number = 36_000
    """most frames of a video, all of which before the last sampled one are decoded; more is a 400
    """
    max_frame_pixels: Number = 2**23
    """largest frame of a video; more is a 400"""
    video_timeout_s: Seconds = 60.0
    """how long a video is decoded, more is a 400, and waits to be, more is a 503"""
    request_timeout_s: SecondsOrNone = 600.0
    """a request's deadline; 504, and its work ends; 0 = none"""
    retry_after_s: Number = 2
    """Retry-After of a 503"""
    drain_timeout_s: SecondsOrNone = 20.0
    """how long accepted requests may go on after SIGTERM"""
    engine_timeout_s: SecondsOrNone = 30.0
    """/ready is a 503 once the engine has not answered for so long; more than its longest step; 0 =
    whatever it does"""
    allow_image_uuid: bool = False
    """let clients name pictures by uuid, apart by API key"""
    log_json: bool = False
    """one JSON line a request, and vLLM's own lines as JSON too"""

    @field_validator("image_formats")
    @classmethod
    def _formats_are_pillows(cls, value: str) -> str:
        from PIL import Image

        known = set(Image.registered_extensions().values())
        for name in value.split(","):
            if name.strip().upper() not in known:
                raise ValueError(unknown_name("format", name.strip(), known))
        return value

    @classmethod
    def parse(cls, flags: Mapping[str, object] | None = None) -> "ServerSettings":
        """Read the variables; flags win.

        Raises:
            ConfigError: an unknown ``ERA_`` variable, or a value that is not allowed.
        """
        try:
            parsed = cls(**dict(flags or {}))
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "?"
            raise ConfigError(
                f"{flag(name)} (or {PREFIX}{name.upper()}): got {first['input']!r}, {first['msg']}"
            ) from error
        if parsed.max_bodies_bytes < parsed.max_body_bytes:
            raise ConfigError(
                f"{flag('max_bodies_bytes')}: got {parsed.max_bodies_bytes}, needed at least "
                f"{flag('max_body_bytes')} ({parsed.max_body_bytes}); a body as large as that "
                "would never be taken"
            )
        return parsed

    def variables(self) -> dict[str, str]:
        """Return the ``ERA_`` variables that say the same in another process.

        All that were given: a default too, where it takes the place of the user's variable.
        """
        given = self.model_fields_set
        return {PREFIX + name.upper(): str(value) for name, value in self if name in given}


def refuse_unknown_variables(known_elsewhere: frozenset[str] = frozenset()) -> None:
    """Check that no ``ERA_`` variable is mistyped or empty.

    Raises:
        ConfigError: with the nearest name.
    """
    own = {PREFIX + name.upper() for name in ServerSettings.model_fields}
    known = own | NOT_OURS | known_elsewhere
    for name, value in os.environ.items():
        if not name.upper().startswith(PREFIX) or _SERVICE.match(f"{name}={value}"):
            continue
        if name in known:
            if not value:
                raise ConfigError(f"{name}: it is empty; unset it, or give it a value")
            continue
        if name.removeprefix(PREFIX).lower() in EraConfig.__dataclass_fields__:
            raise ConfigError(
                f"{name}: only `era-vllm serve` reads it, and passes it on as flags of vLLM; unset "
                "it, and start what `era-vllm serve --print-command` prints"
            )
        hint = f" (in capitals: {name.upper()})" if name.upper() in known else ""
        raise ConfigError(unknown_name("variable", name, known) + hint)


def flag(name: str) -> str:
    """Return a setting's flag."""
    return "--era-" + name.replace("_", "-")


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting."""
    group = parser.add_argument_group("server", "each is an ERA_ variable too: ERA_MAX_BODY_BYTES")
    for name, field in ServerSettings.model_fields.items():
        shown = "" if field.default in (None, False) else f" (default {field.default})"
        options: dict[str, object] = {"metavar": "VALUE"}
        if field.annotation is bool:
            options = {"action": "store_const", "const": True}
        help_ = f"{field.description}{shown}".replace("%", "%%")
        group.add_argument(flag(name), dest=f"server_{name}", help=help_, **options)  # type: ignore[arg-type]


def server_flags(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the settings that were given as flags."""
    values = {name: getattr(arguments, f"server_{name}") for name in ServerSettings.model_fields}
    return {name: value for name, value in values.items() if value is not None}
