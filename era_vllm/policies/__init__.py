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
    "prompt_dependent",
    "needs",
    "select",
    "assign",
    "log_bias",
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
    if getattr(found, "prompt_dependent", None) is not False:
        raise UnsupportedError(
            f"policy {name!r} depends on the prompt, which would make cached images wrong; "
            f"choose one of: {', '.join(policy_names())}"
        )
    return cast("type[PruningPolicy]", found)


def make_policy(config: EraConfig) -> "PruningPolicy":
    """Build the configured policy.

    Raises:
        ConfigError: unknown policy, unknown option (with the nearest name), or a bad value.
    """
    found = policy_class(config.policy)
    hints = get_type_hints(found)
    names = [field.name for field in fields(found)]  # type: ignore[arg-type]  # a dataclass, see above
    options: dict[str, OptionValue] = {}
    for name, value in config.policy_options:
        if name not in names:
            raise ConfigError(unknown_name(f"option of policy {config.policy!r}", name, names))
        options[name] = _converted(f"policy_options.{name}", value, hints[name])
    return found(**options)


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
