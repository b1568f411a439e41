"""One file a policy; the file name is the public name. The folder listing is the menu."""

import importlib
from dataclasses import fields
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Final, Literal, cast, get_args, get_origin, get_type_hints

from era_vllm.config import EraConfig, OptionValue
from era_vllm.errors import ConfigError, UnsupportedError, unknown_name

if TYPE_CHECKING:  # torch, which a help that lists the policies does not wait for
    from era_vllm.contracts import PruningPolicy

_CONTRACT: Final = (
    "__dataclass_fields__",
    "needs",
    "select",
    "assign",
    "log_bias",
)
_ASKING: Final = (
    "--era-policy cdpruner, mfpruner with --era-option relevance=true, or dpp or era with "
    "--era-option relevance_weight=0.1"
)


def policy_names() -> tuple[str, ...]:
    """Names of the policies that ship with the package."""
    return tuple(sorted(module.name for module in iter_modules(__path__)))


def policy_class(name: str) -> "type[PruningPolicy]":
    """Return the class behind a policy name: a file of this folder or ``"package.module:Class"``.

    Raises:
        ConfigError: no such policy (with the nearest name), or it does not keep the contract.
    """
    module_name, _, class_name = name.partition(":")
    if not class_name:
        if name not in policy_names():
            raise ConfigError(unknown_name("policy", name, policy_names()))
        module_name, class_name = f"{__name__}.{name}", "Policy"
    found = getattr(_module(name, module_name), class_name, None)
    missing = [part for part in _CONTRACT if not hasattr(found, part)]
    if not isinstance(found, type) or missing:
        raise ConfigError(
            f"policy {name!r}: {class_name!r} in {module_name!r} is {found!r}, "
            "needed a frozen dataclass that keeps era_vllm.contracts.PruningPolicy (missing: "
            f"{', '.join(missing) or 'a class'})"
        )
    if getattr(found, "prompt_dependent", False):
        raise UnsupportedError(
            f"policy {name!r} says prompt_dependent, by which cached images would be wrong; have "
            "it read Signal.RELEVANCE and serve it with --era-question-aware, or choose one of: "
            f"{', '.join(policy_names())}"
        )
    return cast("type[PruningPolicy]", found)


def make_policy(config: EraConfig) -> "PruningPolicy":
    """Build the configured policy.

    Raises:
        ConfigError: unknown policy, unknown option (with the nearest name), a bad value, or a
            policy that reads what is asked where that is no part of a picture's identity, and the
            other way round.
    """
    found = policy_class(config.policy)
    hints = get_type_hints(found)
    names = [field.name for field in fields(found)]  # type: ignore[arg-type]  # a dataclass, see above
    options: dict[str, OptionValue] = {}
    for name, value in config.policy_options:
        if name not in names:
            raise ConfigError(unknown_name(f"option of policy {config.policy!r}", name, names))
        options[name] = _converted(f"policy_options.{name}", value, hints[name])
    policy = found(**options)
    _check_question(policy, config)
    _check_scout(policy, config)
    return policy


def defaults(policy: str, **settings: object) -> EraConfig:
    """Return settings for a policy with its default options: question-aware where it asks.

    Raises:
        ConfigError: unknown policy, or a bad setting.
    """
    from era_vllm.types import Signal

    asks = Signal.RELEVANCE in policy_class(policy)().needs
    return EraConfig.parse({"policy": policy, "question_aware": asks, **settings})


def _check_question(policy: "PruningPolicy", config: EraConfig) -> None:
    from era_vllm.types import Signal

    asks = Signal.RELEVANCE in policy.needs
    if asks and not config.question_aware:
        raise ConfigError(
            f"policy {config.policy!r} with these options reads what is asked of a picture, which "
            "then has to be part of its identity in every cache; add --era-question-aware "
            "(question_aware=True), or choose options or a policy that do not, such as dpp"
        )
    if config.question_aware and not asks:
        raise ConfigError(
            f"era setting question_aware: got True, but policy {config.policy!r} with these "
            "options does not read what is asked, and pictures would be cached for each question "
            f"in vain; choose {_ASKING}, or leave --era-question-aware out"
        )

    if config.question_reduction != "largest" and not asks:
        raise ConfigError(
            f"era setting question_reduction: got {config.question_reduction!r}, but nothing is "
            "pruned for what is asked; add --era-question-aware with a policy that reads it, or "
            "leave --era-question-reduction out"
        )


def _check_scout(policy: "PruningPolicy", config: EraConfig) -> None:
    from era_vllm.contracts import query_layer

    if config.scout_injection and not config.scout:
        raise ConfigError(
            "era setting scout_injection: got true without a scout, whose states are injected; "
            "give --era-scout K too, 1 or more, or leave --era-scout-injection (or the "
            "preset that has it) out"
        )
    if config.scout_prefix is not None and not config.scout and query_layer(policy) < 2:
        raise ConfigError(
            "era setting scout_prefix: got token ids without a scout that they would stand before; "
            "give --era-scout K too, or leave --era-scout-prefix out"
        )
    if config.scout_suffix is not None and not (config.scout and config.question_aware):
        raise ConfigError(
            "era setting scout_suffix: got token ids without a scout that reads questions, behind "
            "which they would stand; give --era-scout K and --era-question-aware too, or leave "
            "--era-scout-suffix out"
        )


def _module(name: str, module_name: str) -> ModuleType:
    try:
        if all(part.isidentifier() for part in module_name.split(".")):
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
    raise ConfigError(f"policy {name!r}: no module {module_name!r} is installed")


def _converted(name: str, value: OptionValue, kind: object) -> OptionValue:
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value in choices:
            return value
        raise ConfigError(f"{name}: got {value!r}, allowed: {', '.join(map(repr, choices))}")
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise ConfigError(f"{name}: got {value!r}, allowed: a {getattr(kind, '__name__', kind)}")
