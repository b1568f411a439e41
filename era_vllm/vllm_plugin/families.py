"""Model families: Hugging Face architecture -> the class that serves it. One row a family.

Names only, so that registering imports no model. Our architectures have names of their own
(``Era`` + the original), chosen by a flag: nothing of vLLM's is overridden.
"""

from typing import Final

from era_vllm.errors import UnsupportedError

FAMILIES: Final = {
    "LlavaForConditionalGeneration": "era_vllm.models.llava:EraLlavaForConditionalGeneration",
}
PREFIX: Final = "Era"


def era_architecture(architectures: list[str] | None) -> str:
    """Return our architecture name for a model's, as it stands in its config.json.

    Raises:
        UnsupportedError: no family of ours serves it.
    """
    for name in architectures or []:
        if name in FAMILIES:
            return PREFIX + name
        if name.removeprefix(PREFIX) in FAMILIES:
            return name
    raise UnsupportedError(
        f"model architecture: got {', '.join(architectures or ['none'])}, allowed: "
        f"{', '.join(FAMILIES)}; serve other models with stock vLLM, or add a file to "
        "era_vllm/models"
    )
