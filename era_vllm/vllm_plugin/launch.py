"""The flags that switch pruning on, for ``LLM()``, ``era-vllm serve`` and plain ``vllm serve``.

One function decides them, so that the three ways give the same engine. A maximum rate of 0 gives
none of them: the engine is stock vLLM. What is left out: running vLLM (``server``).
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from era_vllm.calibration import calibrated
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.policies import make_policy
from era_vllm.vllm_plugin.families import era_architecture
from era_vllm.vllm_plugin.names import PLUGIN, TOKENIZER_MODE
from era_vllm.vllm_plugin.version import check_vllm_version


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start: a model, vLLM's arguments, and the environment that they need."""

    model: str
    engine: Mapping[str, object]
    """Keyword arguments of ``vllm.LLM``, without the model."""
    environment: Mapping[str, str]
    """Variables to set; empty unless ``VLLM_PLUGINS`` is set and leaves us out."""

    def arguments(self, rest: Sequence[str]) -> list[str]:
        """Return the words behind ``vllm serve``: what was typed, then ours.

        The user's own ``--hf-overrides`` and ``--additional-config`` are part of ours (``plan``)
        and left out, in every form: vLLM moves dotted ones (``--hf-overrides.a 1``) behind all
        other words, where they would replace ours as a whole.

        Args:
            rest: Model and further flags, as typed.
        """
        ours = {"--" + name.replace("_", "-"): value for name, value in self.engine.items()}
        words, left = list[str](), iter(rest)
        for word in left:
            flag, sign, _ = word.partition("=")
            if flag.partition(".")[0].replace("_", "-") not in ours:
                words.append(word)
            elif not sign:
                next(left, None)  # its value
        for flag, value in ours.items():
            words += [flag, value if isinstance(value, str) else json.dumps(value, sort_keys=True)]
        return words

    def command(self, arguments: Sequence[str]) -> str:
        """Return the plain ``vllm serve`` line that does the same.

        Args:
            arguments: What ``arguments`` returned.
        """
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(["vllm", "serve", *arguments])])


def plan(
    model: str | os.PathLike[str],
    settings: Mapping[str, object],
    *,
    hf_overrides: Mapping[str, object] | None = None,
    additional_config: Mapping[str, object] | None = None,
    server: bool = False,
) -> Launch:
    """Decide the arguments.

    Args:
        model: Model name or path.
        settings: Fields of ``EraConfig``, and ``calibration``, a file.
        hf_overrides: The user's own, merged; may not name other architectures.
        additional_config: The user's own, merged; may not hold ``era`` too.
        server: For a server, whose front reads the settings also where the engine is stock.

    Raises:
        ConfigError: a bad setting, or two sources for one.
        UnsupportedError: a model family, policy or vLLM version that is not served.
    """
    check_vllm_version()
    model = os.fspath(model)
    config = EraConfig.parse(calibrated(model, settings))
    make_policy(config)
    overrides, additional = dict(hf_overrides or {}), dict(additional_config or {})
    if "era" in additional:
        raise ConfigError(
            "additional_config['era']: pruning settings come from --era-* flags here; drop one of "
            "the two"
        )
    settled = {**additional, "era": _changed(config)}
    if config.max_pruning_rate == 0:
        return Launch(model, {"additional_config": settled} if server else {}, {})
    if "architectures" in overrides:
        raise ConfigError(
            f"hf_overrides['architectures']: got {overrides['architectures']!r}, but pruning "
            "chooses the architecture; drop it, or serve with --era-max-pruning-rate 0"
        )
    architecture = era_architecture(architectures(model_config(model)))
    engine = {
        "hf_overrides": {**overrides, "architectures": [architecture]},
        "tokenizer_mode": TOKENIZER_MODE,
        "additional_config": settled,
    }
    allowed = plugins_to_allow()
    return Launch(model, engine, {} if allowed is None else {"VLLM_PLUGINS": allowed})


def engine_args(model: str | os.PathLike[str], settings: Mapping[str, object]) -> dict[str, object]:
    """Return keyword arguments for ``vllm.LLM``; see ``era_vllm.engine_args``."""
    launch = plan(model, settings)
    if launch.environment:
        raise ConfigError(
            f"VLLM_PLUGINS is {os.environ['VLLM_PLUGINS']!r}, which leaves out 'era' (vLLM keeps "
            f"spaces as part of a name); set VLLM_PLUGINS={launch.environment['VLLM_PLUGINS']} or "
            "unset it"
        )
    return {"model": launch.model, **launch.engine}


def model_config(model: str) -> dict[str, object]:
    """Return a checkpoint's config.json.

    Raises:
        ConfigError: no such checkpoint; the hub's own long text is its cause, not part of it.
    """
    from transformers import PretrainedConfig

    if not model:
        raise ConfigError(
            "model: got an empty name, needed a checkpoint folder or name; is a shell variable "
            "such as $MODEL not set?"
        )
    text = (
        f"model {model!r}: no config.json could be read; needed a folder with a Hugging Face "
        "checkpoint, or the name of one that can be downloaded from here"
    )
    try:
        found, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError) as error:
        raise ConfigError(text) from error
    if not found:
        raise ConfigError(text)
    return found


def architectures(config: Mapping[str, object]) -> list[str]:
    """Return the architecture names of a config.json."""
    return list(cast(list[str] | None, config.get("architectures")) or [])


def plugins_to_allow() -> str | None:
    """Return what ``VLLM_PLUGINS`` must be for vLLM to load us; None where it does already.

    vLLM splits at commas and compares what is between them, spaces included.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or PLUGIN in allowed.split(","):
        return None
    names = [name for part in allowed.split(",") if (name := part.strip())]
    return ",".join(names if PLUGIN in names else [*names, PLUGIN])


def _changed(config: EraConfig) -> dict[str, object]:
    """Settings that differ from the defaults, and always the two that a reader looks for."""
    default = EraConfig().as_dict()
    shown = ("pruning_rate", "policy")
    values = config.as_dict().items()
    return {name: value for name, value in values if name in shown or value != default[name]}
