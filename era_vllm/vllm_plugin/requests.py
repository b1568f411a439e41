"""What a request asks for and what was done with each of its images. No vllm or torch import.

A request says how much to prune by its ``era`` field, for all of its images, or by OpenAI's own
``detail`` of each image; else the server's default holds. The field travels from the route to the
renderer, and the report back, in a ``RequestContext``: one context variable an HTTP request.
Offline there is none, and a prompt may carry its rates itself (``rates``).
"""

import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError, unknown_name

Source = Literal["era", "detail", "default"]
FIELD: Final = "era"
FORMS: Final = '{"pruning_rate": number} or {"level": name}'
DETAILS: Final = {"high": "off", "original": "off", "low": "strong", "auto": None}
"""OpenAI's ``detail`` -> level; None = the server's default."""
_IMAGE_TYPES: Final = frozenset({"image_url", "input_image", "image_pil"})
_IMAGE_KEYS: Final = frozenset({"image_url", "image_pil"})


class FieldError(ConfigError):
    """A field of a request is malformed or out of bounds."""

    def __init__(self, field: str, got: object, allowed: str) -> None:
        super().__init__(f"{field}: got {reprlib.repr(got)}, allowed: {allowed}")
        self.field = field


@dataclass(frozen=True, slots=True)
class ImageRate:
    """One image's effective rate, and what decided it."""

    pruning_rate: float
    source: Source
    clamped: bool = False
    """A ``detail`` out of the server's bounds, brought to the nearer one."""


@dataclass(frozen=True, slots=True)
class ImageReport:
    """What was done with one image, as the response says it."""

    pruning_rate: float
    level: str | None
    """None = a rate without a name."""
    source: Source
    clamped: bool
    tokens_before: int | None
    """Of the encoder; None where the engine is stock, which does not tell."""
    tokens_after: int | None
    """In the prompt."""

    def as_dict(self) -> dict[str, object]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(slots=True)
class RequestContext:
    """One HTTP request: its field in, what was done out."""

    rate: float | None = None
    """The rate that the ``era`` field asks for."""
    details: Sequence[object] | None = None
    """``detail`` of each image, where vLLM's messages do not say; None = they do."""
    only_counted: bool = False
    """Its prompt is not for the engine, whose caches must not be thought to know its pictures."""
    pixels: int = 0
    """Of its pictures so far, decoded or about to be."""
    refusal: Exception | None = None
    """Of the first of its pictures that was refused, and counted."""
    loads: set[Any] = field(default_factory=set)
    """Tasks that load its pictures."""
    images: Sequence[ImageReport] = ()
    """Of the last prompt, which is a chat's only one."""
    all_images: list[ImageReport] = field(default_factory=list)
    """Of all prompts that were made ready for the engine."""

    def report(self, images: Sequence[ImageReport]) -> None:
        """Keep what was done with a prompt's images."""
        self.images = images
        self.all_images += images


_CONTEXT: Final[ContextVar[RequestContext | None]] = ContextVar("era_request", default=None)
current = _CONTEXT.get
"""The context that the caller runs in; None = offline."""


@contextmanager
def request_context() -> Iterator[RequestContext]:
    """Open a request's context; tasks that are started within share it."""
    opened = RequestContext()
    token = _CONTEXT.set(opened)
    try:
        yield opened
    finally:
        _CONTEXT.reset(token)


def requested_rate(field: object, config: EraConfig) -> float | None:
    """Return the rate that an ``era`` field asks for; None = no field.

    Raises:
        FieldError: malformed, an unknown level, or out of the server's bounds.
    """
    if field is None:
        return None
    if not isinstance(field, Mapping) or len(field) != 1:
        raise FieldError(FIELD, field, FORMS)
    ((name, value),) = field.items()
    if name == "pruning_rate":
        if not config.serves(value):
            raise FieldError(f"{FIELD}.{name}", value, f"a number in {config.bounds}")
        return config.check_rate(value)
    if name == "level":
        return _rate_of_level(value, config)
    raise FieldError(
        FIELD, field, f"{FORMS} ({unknown_name('field', name, ('level', 'pruning_rate'))})"
    )


def _rate_of_level(level: object, config: EraConfig) -> float:
    served = {name: rate for name, rate in config.levels if config.serves(rate)}
    if isinstance(level, str) and level in served:
        return config.check_rate(served[level])
    names = ", ".join(f"{name} ({rate:.10g})" for name, rate in served.items())
    allowed = f"{names or 'none'} (levels with a rate in {config.bounds})"
    raise FieldError(f"{FIELD}.level", level, allowed)


def image_rates(
    details: Iterable[object], asked: float | None, config: EraConfig
) -> list[ImageRate]:
    """Return each image's effective rate: what was asked for, else its detail, else the default.

    Args:
        details: ``detail`` of each image, None where it has none.
        asked: What ``requested_rate`` returned.
        config: The server's settings.

    Raises:
        FieldError: an unknown detail.
    """
    return [_image_rate(detail, asked, config) for detail in details]


def _image_rate(detail: object, asked: float | None, config: EraConfig) -> ImageRate:
    if detail is not None and not (isinstance(detail, str) and detail in DETAILS):
        raise FieldError("image_url.detail", detail, ", ".join(DETAILS))
    if asked is not None:
        return ImageRate(asked, "era")
    level = DETAILS[detail] if detail is not None else None
    if level is None:
        return ImageRate(config.check_rate(config.pruning_rate), "default")
    wanted = dict(config.levels)[level]
    rate = min(max(wanted, config.min_pruning_rate), config.max_pruning_rate)
    return ImageRate(config.check_rate(rate), "detail", clamped=rate != wanted)


def image_details(messages: Iterable[object]) -> list[object]:
    """Return the ``detail`` of every image of a chat, in the prompt's order; None = it has none.

    Args:
        messages: As in a chat request; ``content`` must be a string or a list.

    Upstream: vllm/renderers/chat_utils.py:1699 ``_parse_chat_message_content_mm_part`` (0.32.0),
    which decides what is an image.
    """
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return [_detail(part) for part in parts if is_image(part)]


def is_image(part: object) -> bool:
    """Say whether a part of a message is an image."""
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    if kind is None or part.get("uuid") is not None:
        return not _IMAGE_KEYS.isdisjoint(part)
    return isinstance(kind, str) and kind in _IMAGE_TYPES


def _detail(part: Mapping[str, object]) -> object:
    url = part.get("image_url")
    within = url.get("detail") if isinstance(url, dict) else None
    return part.get("detail") if within is None else within


def reports(
    rates: Sequence[ImageRate],
    before: Sequence[int | None],
    after: Sequence[int | None],
    config: EraConfig,
) -> list[ImageReport]:
    """Return what the response says of each image.

    Args:
        rates: What decided each image's rate.
        before: Tokens of each from the encoder.
        after: Tokens of each in the prompt.
        config: The server's settings.
    """
    return [
        ImageReport(
            pruning_rate=rate.pruning_rate,
            level=config.level(rate.pruning_rate),
            source=rate.source,
            clamped=rate.clamped,
            tokens_before=tokens_before,
            tokens_after=tokens_after,
        )
        for rate, tokens_before, tokens_after in zip(rates, before, after, strict=True)
    ]
