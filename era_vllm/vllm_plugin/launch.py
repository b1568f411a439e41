"""The flags that switch pruning on, for ``LLM()``, ``era-vllm serve`` and plain ``vllm serve``.

One function decides them, so that the three ways give the same engine. A maximum rate of 0 gives
none of them: the engine is stock vLLM.
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.policies import make_policy
from era_vllm.vllm_plugin.families import era_architecture
from era_vllm.vllm_plugin.register import TOKENIZER_MODE
from era_vllm.vllm_plugin.version import check_vllm_version

PLUGIN = "era"


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start: a model, vLLM's arguments, and the environment that they need."""

    model: str
    engine: Mapping[str, object]
    """Keyword arguments of ``vllm.LLM``, without the model."""
    environment: Mapping[str, str]
    """Variables to set; empty unless ``VLLM_PLUGINS`` is set and leaves us out."""

    def flags(self) -> list[str]:
        """Return the same as flags of ``vllm serve``."""
        out = []
        for name, value in self.engine.items():
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            out += ["--" + name.replace("_", "-"), text]
        return out

    def command(self, rest: Sequence[str]) -> str:
        """Return the plain ``vllm serve`` line that does the same.

        Args:
            rest: Model and further flags, as typed.
        """
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        words = ["vllm", "serve", *rest, *self.flags()]
        return " ".join([*variables, shlex.join(words)])


def plan(
    model: str,
    settings: Mapping[str, object],
    *,
    hf_overrides: Mapping[str, object] | None = None,
    additional_config: Mapping[str, object] | None = None,
) -> Launch:
    """Decide the arguments.

    Args:
        model: Model name or path.
        settings: Fields of ``EraConfig``.
        hf_overrides: The user's own, merged; may not name other architectures.
        additional_config: The user's own, merged; may not hold ``era`` too.

    Raises:
        ConfigError: a bad setting, or two sources for one.
        UnsupportedError: a model family, policy or vLLM version that is not served.
    """
    check_vllm_version()
    config = EraConfig.parse(settings)
    make_policy(config)
    overrides, additional = dict(hf_overrides or {}), dict(additional_config or {})
    if "era" in additional:
        raise ConfigError(
            "additional_config['era']: pruning settings come from --era-* flags here; drop one of "
            "the two"
        )
    if config.max_pruning_rate == 0:
        return Launch(model, {}, {})
    if "architectures" in overrides:
        raise ConfigError(
            f"hf_overrides['architectures']: got {overrides['architectures']!r}, but pruning "
            "chooses the architecture; drop it, or serve with --era-max-pruning-rate 0"
        )
    architecture = era_architecture(_model_config(model).get("architectures"))
    engine = {
        "hf_overrides": {**overrides, "architectures": [architecture]},
        "tokenizer_mode": TOKENIZER_MODE,
        "additional_config": {**additional, "era": _changed(config)},
    }
    return Launch(model, engine, _environment())


def engine_args(model: str, settings: Mapping[str, object]) -> dict[str, object]:
    """Return keyword arguments for ``vllm.LLM``; see ``era_vllm.engine_args``."""
    launch = plan(model, settings)
    if launch.environment:
        raise ConfigError(
            f"VLLM_PLUGINS is {os.environ['VLLM_PLUGINS']!r}, which leaves out 'era'; set "
            f"VLLM_PLUGINS={launch.environment['VLLM_PLUGINS']} or unset it"
        )
    return {"model": model, **launch.engine}


def _model_config(model: str) -> dict[str, list[str] | None]:
    try:
        found, _ = PretrainedConfig.get_config_dict(model)
    except OSError as error:
        raise ConfigError(
            f"model {model!r}: no config.json could be read; needed a folder with a Hugging Face "
            f"checkpoint or a model name ({error})"
        ) from error
    if not found:
        raise ConfigError(f"model {model!r}: no config.json found; needed a checkpoint folder")
    return found


def _changed(config: EraConfig) -> dict[str, object]:
    """Settings that differ from the defaults, and always the two that a reader looks for."""
    default = EraConfig().as_dict()
    shown = ("pruning_rate", "policy")
    values = config.as_dict().items()
    return {name: value for name, value in values if name in shown or value != default[name]}


def _environment() -> dict[str, str]:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or PLUGIN in [name.strip() for name in allowed.split(",")]:
        return {}
    return {"VLLM_PLUGINS": f"{allowed},{PLUGIN}" if allowed else PLUGIN}
