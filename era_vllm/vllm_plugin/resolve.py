"""Settings -> one EraConfig that the processor and every worker see; what cannot work is refused.

Runs once, while vLLM builds its config in the first process: ``additional_config["era"]`` is
parsed, checked against the engine's other settings, and kept in the model's config, which vLLM
sends to all processes.
"""

from vllm.config import VllmConfig

from era_vllm.config import EraConfig
from era_vllm.errors import UnsupportedError
from era_vllm.policies import make_policy
from era_vllm.vllm_plugin.positions import carry_positions
from era_vllm.vllm_plugin.version import check_vllm_version


def resolve(vllm_config: VllmConfig) -> None:
    """Parse, check and keep the settings.

    Raises:
        ConfigError: an unknown or malformed setting.
        UnsupportedError: an engine feature that pruning cannot work with, or another vLLM.
    """
    check_vllm_version()
    raw = vllm_config.additional_config
    config = EraConfig.parse((raw.get("era") if isinstance(raw, dict) else None) or {})
    make_policy(config)
    _refuse(vllm_config)
    hf_config = vllm_config.model_config.hf_config
    if config.positions == "original":
        carry_positions(hf_config)
    hf_config.era = config.as_dict()


def era_config(hf_config: object) -> EraConfig:
    """Return the settings that ``resolve`` kept in a model's config."""
    return EraConfig.parse(getattr(hf_config, "era", None) or {})


def _refuse(vllm_config: VllmConfig) -> None:
    parallel, spec = vllm_config.parallel_config, vllm_config.speculative_config
    compilation = vllm_config.compilation_config
    refused = {
        f"pipeline parallelism {parallel.pipeline_parallel_size} (the bias is not sent between "
        "stages); use tensor parallelism": parallel.pipeline_parallel_size > 1,
        "--enable-dbo (the bias buffer does not know micro-batch offsets); leave it off": (
            parallel.enable_dbo
        ),
        "speculative decoding with a draft model (it would be fed our bias channels); use "
        "method 'ngram'": spec is not None and spec.method not in ("ngram", "ngram_gpu", "suffix"),
        "encoder CUDA graphs (they bypass the pruning step); leave cudagraph_mm_encoder off": bool(
            getattr(compilation, "cudagraph_mm_encoder", False)
        ),
        "--enable-mm-embeds (given embeddings have no encoder to read attention from)": bool(
            vllm_config.model_config.multimodal_config
            and vllm_config.model_config.multimodal_config.enable_mm_embeds
        ),
    }
    if problems := [text for text, wrong in refused.items() if wrong]:
        raise UnsupportedError("era_vllm cannot prune with " + "; nor with ".join(problems))
