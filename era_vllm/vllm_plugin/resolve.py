"""Settings -> one EraConfig that the processor and every worker see; what cannot work is refused.

Runs once, while vLLM builds its config in the first process: ``additional_config["era"]`` is
parsed, checked against the engine's other settings, and kept in the model's config, which vLLM
sends to all processes.
"""

from collections.abc import Sequence

from transformers import PretrainedConfig
from vllm.config import ModelConfig, VllmConfig

from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError, UnsupportedError
from era_vllm.policies import make_policy
from era_vllm.vllm_plugin.families import family_of
from era_vllm.vllm_plugin.names import RATES, SCHEDULER, WORKER
from era_vllm.vllm_plugin.positions import carry_positions
from era_vllm.vllm_plugin.rates import refuse_misspelt
from era_vllm.vllm_plugin.refusals import refuse
from era_vllm.vllm_plugin.scout_text import layers_read, with_text
from era_vllm.vllm_plugin.version import check_vllm_version


def resolve(vllm_config: VllmConfig) -> None:
    """Parse, check and keep the settings.

    Raises:
        ConfigError: an unknown or malformed setting, or one in the wrong place.
        UnsupportedError: an engine feature that pruning cannot work with, or another vLLM.
    """
    check_vllm_version()
    raw = vllm_config.additional_config
    config = EraConfig.parse((raw.get("era") if isinstance(raw, dict) else None) or {})
    make_policy(config)
    hf_config = vllm_config.model_config.hf_config
    hf_config.era = config.as_dict()
    refuse(vllm_config)
    if needed := layers_read(config):
        _refuse_layers(hf_config, needed)
        config = with_text(vllm_config.model_config, config)
        for name in ("scout_prefix", "scout_suffix"):
            _refuse_ids(vllm_config.model_config, name, getattr(config, name) or ())
        hf_config.era = config.as_dict()
    _refuse_rate(vllm_config)
    refuse_joined_frames(hf_config, config)
    if family_of(hf_config).axes > 1 and config.positions == "compact":
        raise UnsupportedError(
            "positions: got 'compact', which a model with M-RoPE has no meaning for; allowed: "
            "'original' (leave --era-positions out)"
        )
    if family_of(hf_config).axes == 1 and config.positions == "original":
        carry_positions(hf_config)
    if not vllm_config.parallel_config.worker_extension_cls:  # a user's own keeps its place
        vllm_config.parallel_config.worker_extension_cls = WORKER
    _schedule(vllm_config)


def _refuse_layers(hf_config: PretrainedConfig, needed: int) -> None:
    """Refuse more layers on the picture alone than the language model has."""
    layers = int(hf_config.get_text_config().num_hidden_layers)
    if needed > layers:
        raise UnsupportedError(
            f"scout: got layer {needed} (--era-scout, or the layer that a policy reads), allowed: "
            f"up to {layers}, those of the language model"
        )


def _refuse_ids(model_config: ModelConfig, name: str, ids: Sequence[int]) -> None:
    """Refuse ids that the model has no embedding of, and more than fit in a prompt."""
    flag = f"--era-{name.replace('_', '-')}"
    known = int(model_config.hf_config.get_text_config().vocab_size)
    if unknown := [token for token in ids if token >= known]:
        raise ConfigError(
            f"era setting {name}: got token {unknown[0]}, allowed: 0 to {known - 1}, those "
            f"of the model ({flag})"
        )
    if len(ids) >= model_config.max_model_len:
        raise ConfigError(
            f"era setting {name}: got {len(ids)} tokens, allowed: fewer than "
            f"{model_config.max_model_len}, the longest prompt (--max-model-len)"
        )


def _schedule(vllm_config: VllmConfig) -> None:
    """Have our scheduler used, over the user's own if there is one."""
    scheduling = vllm_config.scheduler_config
    if scheduling.scheduler_cls not in (None, SCHEDULER):
        from era_vllm.vllm_plugin.scheduler import importable_name

        own = importable_name(scheduling.scheduler_cls)
        vllm_config.model_config.hf_config.era_scheduler = own
    scheduling.scheduler_cls = SCHEDULER


def _refuse_rate(vllm_config: VllmConfig) -> None:
    """Refuse a rate among the arguments of every picture: prompts carry theirs in its place."""
    of_images = vllm_config.model_config.multimodal_config
    given = (of_images.mm_processor_kwargs if of_images else None) or {}
    if RATES in given:
        raise ConfigError(
            f"mm_processor_kwargs of the engine: got {RATES!r}: {given[RATES]!r}, which is a "
            "prompt's; set the engine's default rate with pruning_rate (engine_args(model, "
            "pruning_rate=...)) or --era-pruning-rate"
        )
    refuse_misspelt(given)


def refuse_joined_frames(hf_config: object, config: EraConfig) -> None:
    """Refuse frames that are pruned together where text stands between them.

    Raises:
        UnsupportedError: a family of which each frame is a run.
    """
    if family_of(hf_config).frame_runs and config.frames_per_segment > 1:
        raise UnsupportedError(
            f"frames_per_segment: got {config.frames_per_segment}, but this family's videos have "
            "text between their frames, which cannot be pruned together; allowed: 1 (leave "
            "--era-frames-per-segment out)"
        )


def era_config(hf_config: object) -> EraConfig:
    """Return the settings that ``resolve`` kept in a model's config."""
    return EraConfig.parse(getattr(hf_config, "era", None) or {})
