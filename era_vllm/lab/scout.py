"""The scout in plain transformers: what comes out of a language model's first layers for a picture.

The Hugging Face model itself runs on prefix and picture, and is listened to. Nothing of vLLM is
used. Leaves out who compares by it (``oracle.py``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from era_vllm.errors import UnsupportedError


def chat_prefix(processor: Any, mark: int) -> list[int]:  # noqa: ANN401  # transformers'
    """Return the token ids of what a chat template writes before a picture.

    Args:
        mark: Token id that stands for the picture.
    """
    content = [{"type": "image"}, {"type": "text", "text": "scout"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[: ids.index(mark)]


@torch.inference_mode()
def scout_states(
    language_model: Any,  # noqa: ANN401  # Hugging Face's, of any family
    prefix: Sequence[int],
    embeds: Float[Tensor, "s n d"],
    layers: int,
    arguments: Mapping[str, object] | None = None,
) -> Float32[Tensor, "s n d"]:
    """Return the output of layer ``layers``, from 1, for pictures alone; 0: the embeddings.

    Args:
        language_model: Takes embeddings; has ``layers`` and ``norm``.
        prefix: Token ids before each picture.
        embeds: Of the pictures, as the projector gives them.
        arguments: Further ones of the model, for prefix and picture (positions, feature maps).

    Raises:
        UnsupportedError: the model has fewer layers, or was loaded without.
    """
    if layers > len(language_model.layers):
        raise UnsupportedError(
            f"scout: got {layers} layers, allowed: up to {len(language_model.layers)}, those that "
            "the language model was loaded with"
        )
    found: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    several = [*language_model.layers, language_model.norm]
    hook = several[layers].register_forward_pre_hook(keep, with_kwargs=True)
    before = language_model.get_input_embeddings()(torch.tensor([list(prefix)], dtype=torch.int64))
    given = torch.cat([before.to(embeds.dtype).expand(len(embeds), -1, -1), embeds], 1)
    try:
        language_model(inputs_embeds=given, use_cache=False, **(arguments or {}))
    finally:
        hook.remove()
    return found[0][:, len(prefix) :].float()
