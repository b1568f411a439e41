"""Calibration files: what was measured on one model with one way of pruning, and what it is for.

    {"format": 1, "gamma": {"values": [[...], ...], "model": "<hash>", "settings": {...}}}

A section each for what can be calibrated, with its own validity: ``gamma``, and ``mass_scale`` of
the policy ``era``, with which gamma beside it was measured. ``calibrated`` turns ``calibration =
FILE`` among settings into the fields that it sets, so that its content is in the fingerprint of
every cache. Leaves out the measuring (``lab/calibrate.py``).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError, unknown_name
from era_vllm.policies import make_policy

FORMAT: Final = 1
SECTIONS: Final = ("mass_scale", "gamma")
"""In the order in which they are set: gamma belongs to the mass beside it."""
_ROWS: Final = "[layer][KV head]"
SETTING: Final = "calibration"
"""The key among settings that names a file."""
_WEIGHTS: Final = (".safetensors", ".bin")
_SAMPLE: Final = 1 << 16
"""Bytes read at the beginning, middle and end of a file of weights."""
_OF_TENSOR: Final = 1 << 10
"""Bytes read in the middle of each tensor."""
_LARGEST: Final = 1 << 24
"""Bytes of a calibration file, or of the head of a file of weights."""
_NOT_THE_MODEL: Final = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})


def settings_of(config: EraConfig, section: str = "gamma") -> dict[str, object]:
    """Return the settings that must be those of the calibration: all but itself that change a
    picture's tokens and their bias. Newlines between (``separators``) may differ."""
    values = config.as_dict()
    names = ("policy", "merge", "positions", "attention_queries", "attention_layer")
    blocks = ("max_segment", "min_anchors", "frames_per_segment")
    scout = ("scout", "scout_prefix", "scout_suffix", "scout_injection")
    question = ("question_aware", "question_reduction")
    options = asdict(make_policy(config))  # type: ignore[call-overload]  # a dataclass
    options.pop(section, None)
    return {
        **{name: values[name] for name in (*names, *blocks, *scout, *question)},
        "policy_options": options,
    }


def model_identity(folder: Path) -> str:
    """Hash what makes a checkpoint: its config, and a sample of every tensor.

    Raises:
        ConfigError: no folder with a config.json and weights.
    """
    files = sorted(
        file
        for file in (folder.iterdir() if folder.is_dir() else ())
        if file.suffix in _WEIGHTS and file.is_file()
    )
    path = folder / "config.json"
    if not path.is_file() or not files:
        raise ConfigError(
            f"calibration: got the model {str(folder)!r}, needed a folder with config.json and "
            "weights, which say whether the file belongs to it; name the folder that a model was "
            "downloaded to, before any other folder"
        )
    try:
        config = _plain(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise ConfigError(f"calibration: {str(path)!r} is no JSON ({error})") from error
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in files:
        size = file.stat().st_size
        found.update(os.fsencode(file.name) + f" {size}".encode())
        with file.open("rb") as opened:
            head = int.from_bytes(opened.read(8), "little")
            starts = [(start, _SAMPLE) for start in (0, size // 2, max(0, size - _SAMPLE))]
            if file.suffix == ".safetensors" and head < min(size, _LARGEST):
                starts += [(start, _OF_TENSOR) for start in _middles(opened.read(head), 8 + head)]
            for start, length in starts:
                opened.seek(start)
                found.update(opened.read(length))
    return found.hexdigest()


def _middles(head: bytes, first: int) -> list[int]:
    """Return the middle of each tensor of a safetensors file, from its head."""
    try:
        tensors = json.loads(head)
        ends = [about["data_offsets"] for name, about in tensors.items() if name != "__metadata__"]
        return sorted(first + (start + end) // 2 for start, end in ends)
    except (ValueError, TypeError, KeyError, AttributeError):
        return []  # a loader will say what is wrong with it


def _plain(config: Any) -> Any:  # noqa: ANN401  # JSON
    if isinstance(config, dict):
        return {key: _plain(value) for key, value in config.items() if key not in _NOT_THE_MODEL}
    return config


def write(
    path: Path,
    model: Path,
    sections: Mapping[str, tuple[EraConfig, object]],
    about: Mapping[str, object],
) -> None:
    """Write a file.

    Args:
        sections: Name -> the settings it was measured with, and its values: of ``gamma``
            [layers][KV heads], or [layers][1]; of ``mass_scale`` a number.
        about: What else a reader should know: command, pictures, commit.
    """
    known = model_identity(model)
    content: dict[str, object] = {"format": FORMAT}
    for name in SECTIONS:
        if name in sections:
            config, values = sections[name]
            settings = settings_of(config, name)
            content[name] = {"values": values, "model": known, "settings": settings, **about}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def calibrated(model: str, settings: Mapping[str, object]) -> dict[str, object]:
    """Return settings in which ``calibration`` has become what it sets; without it the same ones.

    Args:
        model: The folder that is served.

    Raises:
        ConfigError: the file cannot be read, is of another model or way of pruning, or what it sets
            is set beside it.
    """
    found = dict(settings)
    path = found.pop(SETTING, None)
    if path is None:
        return found
    if not isinstance(path, str | Path):
        raise ConfigError(f"{SETTING}: got {path!r}, needed the name of a file")
    sections = _sections(Path(path))
    said = f"{SETTING} {str(path)!r}"
    for name, section in sections.items():
        config = EraConfig.parse(found)
        if name in dict(config.policy_options) or found.get(name) is not None:
            raise ConfigError(f"{SETTING} and {name}: choose one; {str(path)!r} sets {name}")
        if section["model"] != model_identity(Path(model)):
            raise ConfigError(
                f"{said}: was measured on another model than {model!r}, or its "
                "weights have changed; measure this one: era-vllm calibrate MODEL"
            )
        _refuse_settings(said, config, name, section["settings"])
        values = section["values"]
        if name == "mass_scale":
            given = found.get("policy_options")
            found["policy_options"] = {
                **(given if isinstance(given, Mapping) else {}),
                name: values,
            }
        else:
            found[name] = [row[0] if len(row) == 1 else row for row in values]
        try:
            make_policy(EraConfig.parse(found))
        except ConfigError as error:
            raise ConfigError(f"{said}: {error}") from error
    return found


def _refuse_settings(said: str, config: EraConfig, section: str, known: dict[str, Any]) -> None:
    ours = settings_of(config, section)
    differing = [name for name in ours if ours[name] != known.get(name)]
    if differing or not config.bias:
        name = differing[0] if differing else "bias"
        was = json.dumps(known[name]) if name in known else "true" if name == "bias" else "nothing"
        raise ConfigError(
            f"{said}: was measured with {name} = {was}, got "
            f"{json.dumps(ours.get(name, config.bias))}; prune as it was measured, or measure anew"
        )


def _sections(path: Path) -> dict[str, dict[str, Any]]:
    try:
        with path.open("rb") as opened:
            content = json.loads(opened.read(_LARGEST))
    except OSError as error:
        raise ConfigError(f"{SETTING} {str(path)!r}: {error.strerror}; name a file") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{SETTING} {str(path)!r}: is no JSON ({error}); needed what era-vllm calibrate writes"
        ) from error
    known = content if isinstance(content, dict) and content.get("format") == FORMAT else {}
    if unknown := [name for name in known if name not in ("format", *SECTIONS)]:
        raise ConfigError(
            f"{SETTING} {str(path)!r}: {unknown_name('section', unknown[0], SECTIONS)}"
        )
    found = {name: known[name] for name in SECTIONS if name in known}
    if broken := [name for name, section in found.items() if not isinstance(section, dict)]:
        raise ConfigError(
            f"{SETTING} {str(path)!r}: {broken[0]} is no section; write it anew: era-vllm calibrate"
        )
    if not found:
        raise ConfigError(
            f"{SETTING} {str(path)!r}: has no section {' or '.join(SECTIONS)} of format {FORMAT}; "
            "needed what era-vllm calibrate writes"
        )
    for name, section in found.items():
        bad = [] if "values" in section else ["values"]
        kinds = {"model": str, "settings": dict}
        bad += [key for key, kind in kinds.items() if not isinstance(section.get(key), kind)]
        if bad:
            raise ConfigError(
                f"{SETTING} {str(path)!r}: {name} has no {bad[0]}; write it anew: era-vllm "
                "calibrate"
            )
        values = section["values"]
        if name == "mass_scale":
            right, needed = (
                isinstance(values, int | float) and not isinstance(values, bool),
                "number",
            )
        else:
            rows = values if isinstance(values, list) else []
            right, needed = rows and all(isinstance(row, list) and row for row in rows), _ROWS
        if not right:
            raise ConfigError(f"{SETTING} {str(path)!r}: {name}'s values are no {needed}")
    return found
