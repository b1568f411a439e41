"""What an engine may not do while it prunes: one row a feature, which is also its documentation.

Read by ``resolve`` while vLLM builds its config, once our settings are in it. Leaves out what only
the model knows, such as its attention (``attention/layer.py``) or its rotary table
(``positions.py``). Names no vLLM at import.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from era_vllm.attention.bias_store import STORES
from era_vllm.compat import cpu_attention
from era_vllm.config import EraConfig
from era_vllm.errors import UnsupportedError
from era_vllm.policies import make_policy
from era_vllm.types import OF_ENCODER, OF_LANGUAGE_MODEL, Signal

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class Refusal:
    """An engine feature that is refused at start."""

    feature: str
    """As a user asks for it."""
    why: str
    instead: str
    """What works."""
    wanted: Callable[["VllmConfig"], bool]
    """Whether a config asks for it."""


KV_CACHE_DTYPES: Final = frozenset({"auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3"})
"""vLLM's names of what a bias can be stored in."""

REFUSALS: Final = (
    Refusal(
        "pipeline parallelism (--pipeline-parallel-size)",
        "the bias is not sent between stages",
        "use tensor parallelism",
        lambda config: config.parallel_config.pipeline_parallel_size > 1,
    ),
    Refusal(
        "prefill context parallelism (--prefill-context-parallel-size)",
        "ranks share out a prompt's tokens, and the bias buffer knows only whole steps",
        "use tensor parallelism",
        lambda config: config.parallel_config.prefill_context_parallel_size > 1,
    ),
    Refusal(
        "decode context parallelism (--decode-context-parallel-size)",
        "ranks share out a request's KV cache token by token, which no test has seen with biases",
        "use tensor parallelism",
        lambda config: config.parallel_config.decode_context_parallel_size > 1,
    ),
    Refusal(
        "micro-batches (--enable-dbo, --ubatch-size)",
        "the bias buffer does not know their offsets",
        "leave both flags off",
        lambda config: config.parallel_config.use_ubatching,
    ),
    Refusal(
        "speculative decoding with a draft model (--speculative-config)",
        "it would be fed our bias channels",
        "use method 'ngram'",
        lambda config: (
            config.speculative_config is not None
            and config.speculative_config.method not in ("ngram", "ngram_gpu", "suffix")
        ),
    ),
    Refusal(
        "encoder CUDA graphs (cudagraph_mm_encoder)",
        "they bypass the pruning step",
        "leave them off",
        lambda config: config.compilation_config.cudagraph_mm_encoder,
    ),
    Refusal(
        "a compiled encoder (compile_mm_encoder)",
        "attention is read by a hook within its blocks, which a compiled block does not call",
        "leave it off",
        lambda config: config.compilation_config.compile_mm_encoder,
    ),
    Refusal(
        "encoders that share out images (--mm-encoder-tp-mode data) with a policy that reads the "
        "encoder's attention",
        "a rank would read that of other images than it prunes",
        "use --mm-encoder-tp-mode weights, or --era-policy dpp",
        lambda config: bool(
            config.model_config.multimodal_config
            and config.model_config.multimodal_config.mm_encoder_tp_mode == "data"
            and _needs(config, OF_ENCODER)
        ),
    ),
    Refusal(
        "vLLM's own pruning of videos (--video-pruning-rate)",
        "it puts channels behind every embedding and takes the last ones away again: ours",
        "leave it out; --era-pruning-rate says how much is pruned",
        lambda config: bool(
            config.model_config.multimodal_config
            and config.model_config.multimodal_config.video_pruning_rate
        ),
    ),
    Refusal(
        "layers without attention (hybrid and attention-free models)",
        "they have no keys for a bias, and take a merged token for one",
        "choose a model with attention in every layer",
        lambda config: config.model_config.is_hybrid or config.model_config.is_attention_free,
    ),
    Refusal(
        "given embeddings (--enable-mm-embeds)",
        "they have no encoder to read attention from",
        "send pictures",
        lambda config: bool(
            config.model_config.multimodal_config
            and config.model_config.multimodal_config.enable_mm_embeds
        ),
    ),
    Refusal(
        "prompt embeddings (--enable-prompt-embeds)",
        "they pass where images do and carry no bias",
        "send text and pictures",
        lambda config: config.model_config.enable_prompt_embeds,
    ),
    Refusal(
        "LoRA adapters of the vision tower (--enable-tower-connector-lora)",
        "vLLM tells the tower once a step which image has which adapter, and ours runs in parts",
        "use adapters of the language model only",
        lambda config: bool(config.lora_config and config.lora_config.enable_tower_connector_lora),
    ),
    Refusal(
        "LoRA adapters (--enable-lora) with a policy that reads the language model's first layer",
        "a picture is encoded once for all requests, whatever adapter each asks for",
        "leave --enable-lora out, or use --era-policy dpp",
        lambda config: bool(config.lora_config and _needs(config, OF_LANGUAGE_MODEL)),
    ),
    Refusal(
        "LoRA adapters (--enable-lora) with a scout (--era-scout)",
        "a picture is encoded once for all requests, whatever adapter each asks for",
        "leave one of the two out",
        lambda config: bool(config.lora_config and config.model_config.hf_config.era["scout"]),
    ),
    Refusal(
        "other numbers in the KV cache (--kv-cache-dtype)",
        "the columns of the bias are rounded for float32, bfloat16, float16 and fp8 (e4m3)",
        "use auto or fp8",
        lambda config: config.cache_config.cache_dtype not in KV_CACHE_DTYPES,
    ),
    Refusal(
        "an fp8 KV cache with bias store value_column on a CPU with AMX (--kv-cache-dtype fp8)",
        "vLLM's AMX kernel takes sums below 1/64 of the value scale for 0, and that scale is wide "
        "enough for masses of 500: text alone would be answered wrongly",
        "use --era-bias-store key_columns, or a cache that is not fp8",
        lambda config: (
            config.cache_config.cache_dtype.startswith("fp8")
            and not STORES[config.model_config.hf_config.era["bias_store"]].limits.flushed
            and cpu_attention.fp8_kernel(config.model_config.dtype) in cpu_attention.FLUSHING
        ),
    ),
    Refusal(
        "an encoder without its language model (--mm-encoder-only, an encoder-cache producer)",
        "the bias is kept in the language model's attention",
        "serve the whole model in one engine",
        lambda config: config.is_mm_encoder_only,
    ),
)


def _needs(config: "VllmConfig", signals: Set[Signal]) -> bool:
    policy = make_policy(EraConfig.parse(config.model_config.hf_config.era))
    return bool(policy.needs & signals)


def refuse(vllm_config: "VllmConfig") -> None:
    """Check every row.

    Raises:
        UnsupportedError: some are asked for; names them all.
    """
    found = [row for row in REFUSALS if row.wanted(vllm_config)]
    if found:
        problems = [f"{row.feature}: {row.why}; {row.instead}" for row in found]
        raise UnsupportedError("era_vllm cannot prune with " + "; nor with ".join(problems))
