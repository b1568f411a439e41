"""Answers end where the positions end that the model was trained on, though tokens are left.

With original positions a prompt of K tokens an image ends N - K positions further on than it has
tokens, and vLLM counts tokens: an answer may be given room past the trained positions, where the
model answers worse, and says nothing of it. So an answer with pruned images ends where it would
have to unpruned, with ``finish_reason`` "length". The processor says how many tokens have room
(``bounded``), and the request that is made of the prompt is held to it (``end_in_time``).

Leaves out: prompts that are too long themselves (``processor.py``); engines that may go on
(``EraConfig.allow_extrapolation``).
"""

from typing import TYPE_CHECKING

from transformers import PretrainedConfig
from vllm.exceptions import VLLMValidationError

from era_vllm.vllm_plugin.positions import rope_parameters

if TYPE_CHECKING:
    from vllm.inputs import EngineInput

    from era_vllm.compat.input_processor import EngineCoreRequest


class BoundedHashes(dict[str, list[str]]):
    """vLLM's hashes of a prompt's images: what of it comes through truncation and beam search."""

    most_tokens: int
    """Of prompt and answer together."""


def bounded(
    hashes: dict[str, list[str]], position_delta: int, text_config: PretrainedConfig
) -> dict[str, list[str]]:
    """Return the hashes of a prompt with images, with the tokens that its positions leave room for.

    Args:
        position_delta: Positions ahead of tokens behind the last image: of 1-D positions the number
            of tokens removed, of M-RoPE vLLM's ``mrope_position_delta``. What is not ahead is left
            to vLLM, which ends it at ``max_model_len``.
    """
    if position_delta <= 0:
        return hashes
    result = BoundedHashes(hashes)
    result.most_tokens = trained_positions(text_config) - position_delta
    return result


def end_in_time(prompt: "EngineInput", request: "EngineCoreRequest") -> None:
    """Lower what a request may generate to the tokens that have room, 1 at least.

    Raises:
        VLLMValidationError: the prompt itself is past them; of beam search, which makes a prompt of
            every step.

    Mutates: request, its sampling parameters, which are its own.
    """
    hashes, params = prompt.get("mm_hashes"), request.sampling_params
    if not isinstance(hashes, BoundedHashes) or params is None or params.max_tokens is None:
        return
    length = len(request.prompt_token_ids or ())
    if length > hashes.most_tokens:
        raise VLLMValidationError(
            f"the prompt is {length} tokens long, and with its images' original positions the "
            f"model was trained for {hashes.most_tokens}, prompt and answer together; ask for "
            "fewer max_tokens, or serve with --era-positions compact or --era-allow-extrapolation",
            parameter="max_tokens",
        )
    params.max_tokens = min(params.max_tokens, max(1, hashes.most_tokens - length))


def trained_positions(text_config: PretrainedConfig) -> int:
    """Return how many positions a model was trained, or scaled, for.

    ``max_position_embeddings``; times the factor with linear and dynamic scaling; with yarn the
    original ones times the factor. Of several rotary embeddings the least. Never the rows of a
    table, which are made more than that (``positions.longer_rope_table``).
    Source: vllm/config/model.py:2538 ``_get_and_verify_max_len`` (0.32.0).
    """
    written = int(text_config.max_position_embeddings)
    found = (_trained(one, written) for one in rope_parameters(text_config))
    return min(found, default=written)


def _trained(rope: dict[str, object], written: int) -> int:
    factor = float(str(rope.get("factor") or 1.0))
    match rope.get("rope_type"):
        case "linear" | "dynamic":
            return int(written * factor)
        case "yarn":
            return int(int(str(rope.get("original_max_position_embeddings") or written)) * factor)
        case _:
            return written
