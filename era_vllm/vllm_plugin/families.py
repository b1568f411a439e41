"""Model families: Hugging Face architecture -> what is known of it before anything is imported.

Our architectures have names of their own (``Era`` + the original), chosen by a flag: nothing of
vLLM's is overridden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from era_vllm.errors import UnsupportedError
from era_vllm.vllm_plugin.names import PREFIX
from era_vllm.vllm_plugin.requests import MODALITIES


@dataclass(frozen=True, slots=True)
class Family:
    """A row: one family."""

    target: str
    """``module:Class`` of the vLLM model."""
    modalities: tuple[str, ...] = ("image",)
    """What is pruned; others that the family's vLLM class takes are refused."""
    axes: Literal[1, 3] = 1
    """Axes of a position: 3 = M-RoPE."""
    frame_runs: bool = False
    """Text stands between the frames of its videos, so that none can be pruned together."""
    opening: str = ""
    """What its processor, not a chat template, writes before a picture's tokens."""


FAMILIES: Final = {
    "LlavaForConditionalGeneration": Family(
        "era_vllm.models.llava:EraLlavaForConditionalGeneration"
    ),
    "LlavaNextForConditionalGeneration": Family(
        "era_vllm.models.llava_next:EraLlavaNextForConditionalGeneration"
    ),
    "LlavaOnevisionForConditionalGeneration": Family(
        "era_vllm.models.llava_onevision:EraLlavaOnevisionForConditionalGeneration",
        ("image", "video"),
    ),
    "InternVLForConditionalGeneration": Family(
        "era_vllm.models.internvl_hf:EraInternVLForConditionalGeneration",
        ("image", "video"),
        frame_runs=True,
        opening="<img>",
    ),
    "InternVLChatModel": Family(
        "era_vllm.models.internvl:EraInternVLChatModel",
        ("image", "video"),
        frame_runs=True,
        opening="<img>",
    ),
    "Qwen2VLForConditionalGeneration": Family(
        "era_vllm.models.qwen2_vl:EraQwen2VLForConditionalGeneration", ("image", "video"), 3
    ),
    "Qwen2_5_VLForConditionalGeneration": Family(
        "era_vllm.models.qwen2_vl:EraQwen2_5_VLForConditionalGeneration", ("image", "video"), 3
    ),
    "Qwen3VLForConditionalGeneration": Family(
        "era_vllm.models.qwen3_vl:EraQwen3VLForConditionalGeneration",
        ("image", "video"),
        3,
        frame_runs=True,
    ),
    "Qwen3VLMoeForConditionalGeneration": Family(
        "era_vllm.models.qwen3_vl:EraQwen3VLMoeForConditionalGeneration",
        ("image", "video"),
        3,
        frame_runs=True,
    ),
}


def era_architecture(architectures: Sequence[str] | None) -> str:
    """Return our architecture name for a model's, as it stands in its config.json.

    Raises:
        UnsupportedError: no family of ours serves it.
    """
    return PREFIX + _original(architectures)


def family_of(hf_config: object) -> Family:
    """Return the row of a model's config.

    Raises:
        UnsupportedError: it has none.
    """
    return FAMILIES[_original(getattr(hf_config, "architectures", None))]


def modalities_of(hf_config: object) -> tuple[str, ...]:
    """Return what a served model takes: its family's, or whatever a request may hold."""
    try:
        return family_of(hf_config).modalities
    except UnsupportedError:  # a stock engine serves any model
        return MODALITIES


def _original(architectures: Sequence[str] | None) -> str:
    for name in architectures or []:
        if (original := name.removeprefix(PREFIX)) in FAMILIES:
            return original
    raise UnsupportedError(
        f"model architecture: got {', '.join(architectures or ['none'])}, allowed: "
        f"{', '.join(FAMILIES)}; serve other models with stock vLLM, or add a file to "
        "era_vllm/models"
    )
