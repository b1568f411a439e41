"""What an engine may not do while it prunes: one row a feature, which is also its documentation.

Read by ``resolve`` while vLLM builds its config. Leaves out what only the model knows, such as its
attention (``attention/layer.py``) or its rotary table (``positions.py``). Names no vLLM at import.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from era_vllm.errors import UnsupportedError

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
        "given embeddings (--enable-mm-embeds)",
        "they have no encoder to read attention from",
        "send pictures",
        lambda config: bool(
            config.model_config.multimodal_config
            and config.model_config.multimodal_config.enable_mm_embeds
        ),
    ),
    Refusal(
        "an encoder without its language model (--mm-encoder-only, an encoder-cache producer)",
        "the bias is kept in the language model's attention",
        "serve the whole model in one engine",
        lambda config: config.is_mm_encoder_only,
    ),
)


def refuse(vllm_config: "VllmConfig") -> None:
    """Check every row.

    Raises:
        UnsupportedError: some are asked for; names them all.
    """
    found = [row for row in REFUSALS if row.wanted(vllm_config)]
    if found:
        problems = [f"{row.feature}: {row.why}; {row.instead}" for row in found]
        raise UnsupportedError("era_vllm cannot prune with " + "; nor with ".join(problems))
