"""The ``--era-*`` flags, shared by every subcommand; each sets one field of ``EraConfig``.

A server takes them from ``ERA_<FIELD>`` variables too; the flag wins.
"""

import argparse
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from era_vllm.config import DEFAULT_POLICY, LEVELS
from era_vllm.errors import ConfigError, unknown_name
from era_vllm.policies import policy_names
from era_vllm.presets import PRESETS

DEFAULT_MODEL: Final = str(Path(__file__).parent.parent / "lab" / "checkpoint")
"""The small LLaVA-1.5 that ships with the package."""
DEFAULT_NAME: Final = "era-sample"
"""The name it is served under."""


def _json(text: str) -> object:
    """Parse a flag's JSON; argparse turns the error into a sentence."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, needed JSON ({error})") from error


_READ_AS: Final = {"R": float, **dict.fromkeys("NLK", int), "JSON": _json}
"""What stands for a value in the help -> how its text is read; any other: as it is."""
_FLAGS: Final = {
    "pruning_rate": (
        "R",
        "fraction of visual tokens removed, [0, maximum] (default .778: 576 -> 128 tokens)",
    ),
    "min_pruning_rate": ("R", "lowest rate served, [0, maximum] (default 0)"),
    "max_pruning_rate": (
        "R",
        "highest rate served, [0, 1) (default .95); 0 = stock vLLM, bit for bit",
    ),
    "levels": (
        "JSON",
        "names that a request may use for rates; off (0) and strong must be among them "
        f"(default {json.dumps(dict(LEVELS))})",
    ),
    "min_anchors": ("N", "tokens always kept of a picture, tile, frame or block (default 1)"),
    "max_segment": (
        "N",
        "tokens that are pruned together at most; a larger picture is cut into near-square blocks "
        "(default 4096)",
    ),
    "frames_per_segment": (
        "N",
        "frames of a video that are pruned together where no text stands between them (default 1)",
    ),
    "policy": (
        "NAME",
        f"how tokens are chosen: {', '.join(policy_names())} (default {DEFAULT_POLICY}), or a "
        "class of your own as package.module:Class",
    ),
    "preset": (
        "NAME",
        f"settings by name, which others win over: {', '.join(PRESETS)} (docs/accuracy.md)",
    ),
    "attention_layer": (
        "L",
        "encoder layer whose attention is read (default: where the features come from)",
    ),
    "attention_queries": (
        "all|cls",
        "queries that the attention of policy era is averaged over (default all)",
    ),
    "positions": (
        "original|compact",
        "whether anchors and text keep their unpruned positions (default original)",
    ),
    "separators": (
        "rows|tile_rows|none",
        "newlines of a tiled picture that stay: of each row, of each row of tiles, none (default "
        "rows)",
    ),
    "bias_store": ("NAME", "where a slot's bias is kept (default key_columns)"),
    "bias_columns": (
        "N",
        "columns of the store (default 1 for float32 caches, 2 for bf16 and fp8)",
    ),
    "gamma": (
        "JSON",
        "exponent of the mass: a number, [one a layer] or [[one a KV head] a layer] (default 1)",
    ),
    "scout": (
        "K",
        "layers of the language model that are run on each picture alone, by whose states tokens "
        "are compared (default 0: by the projector's output)",
    ),
    "scout_prefix": (
        "JSON",
        "token ids before the picture there (default: what the chat template writes)",
    ),
    "scout_suffix": (
        "JSON",
        "token ids behind a question there (default: what the chat template writes)",
    ),
    "question_reduction": (
        "largest|mean",
        "relevance to a question from that to each of its words (default largest)",
    ),
    "calibration": (
        "FILE",
        "gamma (and mass_scale, where it is in it) of a file that era-vllm calibrate wrote for "
        "this model and policy",
    ),
}
"""Field (or ``calibration``, ``preset``) -> what stands for it in the help, meaning."""
_SWITCHES: Final = {
    "merge": "average pruned tokens into anchors",
    "bias": "add the log-bias to attention scores",
    "allow_extrapolation": "with original positions, answer past those that the model was trained "
    "on",
    "scout_injection": "have anchors come out of each of the scout's layers with the mean of their "
    "cluster's states there (needs --era-scout)",
    "question_aware": "prune each picture for what is asked of it, and cache it for that alone",
}
_ON: Final = frozenset({"merge", "bias"})
"""Switches that are on by default."""
_PREFIX: Final = "ERA_"


def add_era_options(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """Add the flags to a subcommand's parser.

    Args:
        without: Fields that mean nothing there; their flags are unknown.
    """
    parser.set_defaults(**{f"era_{name}": None for name in without})
    group = parser.add_argument_group("pruning")
    for name, (metavar, text) in _FLAGS.items():
        if name in without:
            continue
        flag = "--era-" + name.replace("_", "-")
        read = _READ_AS.get(metavar, str)
        group.add_argument(flag, dest=f"era_{name}", type=read, metavar=metavar, help=text)
    group.add_argument(
        "--era-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the policy, repeatable; e.g. --era-option mass_scale=0.39",
    )
    for name, what in _SWITCHES.items():
        if name in without:
            continue
        on, *off = _switch(name)
        yes, no = (f"{what} (default)", "do not") if name in _ON else (what, "do not (default)")
        for flags, value, said in (([on], True, yes), (off, False, no)):
            group.add_argument(
                *flags, dest=f"era_{name}", action="store_const", const=value, help=said
            )


def era_settings(
    arguments: argparse.Namespace, variables: Mapping[str, str] | None = None
) -> dict[str, object]:
    """Return the ``EraConfig`` fields that were set by flags, or else by variables.

    Args:
        arguments: Parsed.
        variables: Environment variables to look at; None = at none.

    Raises:
        ConfigError: a variable or an option cannot be read.
    """
    settings: dict[str, object] = {}
    for name, read in _readers().items():
        if (text := (variables or {}).get(_PREFIX + name.upper())) is not None:
            try:
                settings[name] = read(text)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise ConfigError(f"{_PREFIX}{name.upper()}: got {text!r}: {error}") from error
    for name in [*_FLAGS, *_SWITCHES]:
        if (value := getattr(arguments, f"era_{name}")) is not None:
            settings[name] = value
    if arguments.era_option:
        settings["policy_options"] = dict(map(_option, arguments.era_option))
    return settings


def era_variables() -> frozenset[str]:
    """Return the names of the variables that ``era_settings`` reads."""
    return frozenset(_PREFIX + name.upper() for name in _readers())


def _readers() -> dict[str, Callable[[str], object]]:
    """Field of ``EraConfig`` -> what reads its variable."""
    of_flags = {name: _READ_AS.get(metavar, str) for name, (metavar, _) in _FLAGS.items()}
    return {**of_flags, **dict.fromkeys(_SWITCHES, _json), "policy_options": _json}


def refuse_unknown_era_flags(rest: list[str], more: Iterable[str] = ()) -> None:
    """Raise ConfigError for a mistyped ``--era-*`` flag that would reach vLLM.

    Args:
        more: Flags that are known beside those of ``EraConfig``.
    """
    known = [f"--era-{name.replace('_', '-')}" for name in [*_FLAGS, "option"]]
    known += [flag for name in _SWITCHES for flag in _switch(name)]
    known += more
    for word in rest:
        flag = word.split("=")[0]
        if flag.startswith(("--era", "--no-era")) and flag not in known:
            raise ConfigError(unknown_name("flag", flag, known))


def _switch(name: str) -> tuple[str, str, str]:
    """Flags that switch a setting on, off, and off as argparse spells it."""
    name = name.replace("_", "-")
    return f"--era-{name}", f"--era-no-{name}", f"--no-era-{name}"


def _option(text: str) -> tuple[str, object]:
    if (found := named_value(text)) is None:
        raise ConfigError(f"--era-option: got {text!r}, needed NAME=VALUE")
    return found


def _decimal(text: str) -> float:
    if not re.fullmatch(r"[+-]?(\d{1,300}\.?\d*|\.\d+)([eE][+-]?\d{1,2})?", text):
        raise ValueError(text)
    return float(text)


def named_value(text: str) -> tuple[str, object] | None:
    """Read NAME=VALUE: JSON, a number like .5, or else a word (nan too); None if it is none."""
    name, sign, value = (part.strip() for part in text.partition("="))
    for read in (json.loads, _decimal, str):
        with suppress(ValueError):
            return (name, read(value)) if sign and name else None
    return None
