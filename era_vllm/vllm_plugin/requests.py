"""What a request asks for and what was done with each of its items. No vllm or torch import.

An item is a picture or a video. What is nearest to it decides how much of it is pruned: the ``era``
field of its own part, else OpenAI's ``detail`` there, else the request's ``era`` field, for all of
its items or for each modality, else the server's default. The request's field travels from the
route to the renderer, and the report back, in a ``RequestContext``: one context variable an HTTP
request. Offline there is none, and a prompt may carry its rates itself (``rates``). Leaves out
which parts of a message are items (``parts``).
"""

import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError, unknown_name
from era_vllm.vllm_plugin.names import QUESTION_AWARE
from era_vllm.vllm_plugin.parts import FIELD, PartFields

Source = Literal["part", "detail", "era", "default"]
"""What decided a rate: ``era`` of the item's part, its ``detail``, the request's ``era``, none."""
MODALITIES: Final = ("image", "video")
FORMS: Final = (
    '{"pruning_rate": number} or {"level": name}, or one of them by modality: '
    '{"image": {...}, "video": {...}}'
)
_FORMS_OF_ONE: Final = '{"pruning_rate": number} or {"level": name}'
DETAILS: Final = {"high": "off", "original": "off", "low": "strong", "auto": None}
"""OpenAI's ``detail`` -> level; None = as if it were not there."""


class FieldError(ConfigError):
    """A field of a request is malformed or out of bounds."""

    def __init__(self, field: str, got: object, allowed: str) -> None:
        super().__init__(f"{field}: got {reprlib.repr(got)}, allowed: {allowed}")
        self.field = field


@dataclass(frozen=True, slots=True)
class ItemRate:
    """One item's effective rate, and what decided it."""

    pruning_rate: float
    source: Source
    clamped: bool = False
    """A ``detail`` out of the server's bounds, brought to the nearer one."""


@dataclass(frozen=True, slots=True)
class ItemReport:
    """What was done with one item, as the response says it."""

    pruning_rate: float
    level: str | None
    """None = a rate without a name."""
    source: Source
    clamped: bool
    tokens_before: int | None
    """Of the encoder; None where the engine is stock, which does not tell."""
    tokens_after: int | None
    """In the prompt."""
    question_tokens: int | None = None
    """Of the question that it was pruned for; None where the engine prunes for none."""

    def as_dict(self) -> dict[str, object]:
        """Return plain JSON values."""
        values = asdict(self)
        if self.question_tokens is None:
            del values["question_tokens"]
        return values


Reports = Mapping[str, Sequence[ItemReport]]
"""By modality."""


@dataclass(slots=True)
class RequestContext:
    """One HTTP request: its field in, what was done out."""

    rates: Mapping[str, float] = field(default_factory=dict)
    """Modality -> the rate that the ``era`` field asks for."""
    question_aware: bool = True
    """False: its items are pruned as if nothing were asked of them, and shared."""
    questions: Mapping[str, Sequence[str]] | None = None
    """Modality -> what is asked of each item, where it is not its prompt's text."""
    part_fields: Mapping[str, Sequence[PartFields]] | None = None
    """Modality -> what each item's part says, where vLLM's messages do not; None = they do."""
    only_counted: bool = False
    """Its prompt is not for the engine, whose caches must not be thought to know its pictures."""
    pixels: int = 0
    """Of its pictures so far, decoded or about to be."""
    refusal: Exception | None = None
    """Of the first of its pictures that was refused, and counted."""
    loads: set[Any] = field(default_factory=set)
    """Tasks that load its pictures."""
    items: Reports = field(default_factory=dict)
    """Of the last prompt, which is a chat's only one."""
    all_items: list[tuple[str, ItemReport]] = field(default_factory=list)
    """Of all prompts that were made ready for the engine, each with its modality."""

    def report(self, items: Reports) -> None:
        """Keep what was done with a prompt's items."""
        self.items = items
        self.all_items += [(modality, one) for modality, some in items.items() for one in some]


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


def requested_rates(
    field: object, config: EraConfig, modalities: Sequence[str]
) -> dict[str, float]:
    """Return the rates that an ``era`` field asks for, by modality; none it does not speak of.

    Args:
        field: As it came; None = none.
        config: The server's settings.
        modalities: Those that the model takes.

    Raises:
        FieldError: malformed, an unknown level, out of the server's bounds, or for a modality that
            the model does not take.
    """
    if field is None:
        return {}
    if not isinstance(field, Mapping) or not field:
        raise FieldError(FIELD, field, FORMS)
    if QUESTION_AWARE in field:
        field = {name: value for name, value in field.items() if name != QUESTION_AWARE}
        if not field:
            return {}
    if not any(name in field for name in MODALITIES):
        return dict.fromkeys(modalities, _requested_rate(field, config, FIELD, FORMS))
    for name, value in field.items():
        if name not in modalities:
            taken = ", ".join(modalities)
            raise FieldError(f"{FIELD}.{name}", value, f"{taken} (what this model takes)")
    return {
        name: _requested_rate(value, config, f"{FIELD}.{name}", _FORMS_OF_ONE)
        for name, value in field.items()
    }


def requested_question(field: object, config: EraConfig) -> bool:
    """Return whether an ``era`` field wants items pruned for what is asked of them.

    Args:
        field: As it came; None = none.
        config: The server's settings.

    Raises:
        FieldError: no boolean, or true of a server that does not.
    """
    given = field.get(QUESTION_AWARE) if isinstance(field, Mapping) else None
    return checked_question_aware(given, config, f"{FIELD}.{QUESTION_AWARE}")


def checked_question_aware(given: object, config: EraConfig, at: str) -> bool:
    """Return what was asked for, or what is served where nothing was.

    Raises:
        FieldError: no boolean, or true of an engine that does not.
    """
    if given is None:
        return config.question_aware
    if not isinstance(given, bool):
        raise FieldError(at, given, "true or false" if config.question_aware else "false")
    if given and not config.question_aware:
        allowed = "false, or an engine that was started with --era-question-aware"
        raise FieldError(at, given, allowed)
    return given


def _requested_rate(value: object, config: EraConfig, at: str, forms: str) -> float:
    if not isinstance(value, Mapping) or len(value) != 1:
        raise FieldError(at, value, forms)
    ((name, wanted),) = value.items()
    if name == "pruning_rate":
        if not config.serves(wanted):
            raise FieldError(f"{at}.{name}", wanted, f"a number in {config.bounds}")
        return config.check_rate(wanted)
    if name == "level":
        return _rate_of_level(wanted, config, at)
    known = ("level", "pruning_rate", *((*MODALITIES, QUESTION_AWARE) if at == FIELD else ()))
    raise FieldError(at, value, f"{forms} ({unknown_name('field', str(name), known)})")


def _rate_of_level(level: object, config: EraConfig, at: str) -> float:
    served = {name: rate for name, rate in config.levels if config.serves(rate)}
    if isinstance(level, str) and level in served:
        return config.check_rate(served[level])
    names = ", ".join(f"{name} ({rate:.10g})" for name, rate in served.items())
    allowed = f"{names or 'none'} (levels with a rate in {config.bounds})"
    raise FieldError(f"{at}.level", level, allowed)


def item_rates(
    fields: Iterable[PartFields | None], asked: float | None, config: EraConfig
) -> list[ItemRate]:
    """Return each item's effective rate: its part's own, else its detail, what was asked, default.

    Args:
        fields: What the part of each says; None = it has none.
        asked: What ``requested_rates`` returned for the modality.
        config: The server's settings.

    Raises:
        FieldError: an unknown detail, or a field that is malformed or out of the server's bounds.
    """
    return [_item_rate(one or PartFields(), asked, config) for one in fields]


def _item_rate(fields: PartFields, asked: float | None, config: EraConfig) -> ItemRate:
    detail = fields.detail
    if detail is not None and not (isinstance(detail, str) and detail in DETAILS):
        raise FieldError(fields.place(fields.detail_at), detail, ", ".join(DETAILS))
    if fields.era is not None:
        rate = _requested_rate(fields.era, config, fields.place(FIELD), _FORMS_OF_ONE)
        return ItemRate(rate, "part")
    if detail is not None and (level := DETAILS[detail]) is not None:
        wanted = dict(config.levels)[level]
        rate = min(max(wanted, config.min_pruning_rate), config.max_pruning_rate)
        return ItemRate(config.check_rate(rate), "detail", clamped=rate != wanted)
    if asked is not None:
        return ItemRate(asked, "era")
    return ItemRate(config.check_rate(config.pruning_rate), "default")


def reports(
    rates: Sequence[ItemRate],
    before: Sequence[int | None],
    after: Sequence[int | None],
    config: EraConfig,
    asked: Sequence[int] | None = None,
) -> list[ItemReport]:
    """Return what the response says of each item of a modality.

    Args:
        rates: What decided each one's rate.
        before: Tokens of each from the encoder.
        after: Tokens of each in the prompt.
        config: The server's settings.
        asked: Tokens of the question that each was pruned for; None where there are none.
    """
    questions = [None] * len(rates) if asked is None else asked
    return [
        ItemReport(
            pruning_rate=rate.pruning_rate,
            level=config.level(rate.pruning_rate),
            source=rate.source,
            clamped=rate.clamped,
            tokens_before=tokens_before,
            tokens_after=tokens_after,
            question_tokens=question_tokens,
        )
        for rate, tokens_before, tokens_after, question_tokens in zip(
            rates, before, after, questions, strict=True
        )
    ]
