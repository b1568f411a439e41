"""The scout in plain transformers: what comes out of a language model's first layers for a picture,
and how a question's words look at it there.

The Hugging Face model itself runs on prefix and picture, and is listened to. Nothing of vLLM is
used. Leaves out who compares by it (``oracle.py``).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from era_vllm.chat_text import text_around
from era_vllm.config import EraConfig
from era_vllm.contracts import query_layer
from era_vllm.errors import UnsupportedError
from era_vllm.policies import make_policy
from era_vllm.question import Question
from era_vllm.types import Signal


def chat_prefix(processor: Any, mark: int) -> list[int]:  # noqa: ANN401  # transformers'
    """Return the token ids of what a chat template writes before a picture.

    Args:
        mark: Token id that stands for the picture.
    """
    content = [{"type": "image"}, {"type": "text", "text": "scout"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[: ids.index(mark)]


def chat_suffix(processor: Any) -> list[int]:  # noqa: ANN401
    """Return the token ids of what a chat template writes between a user's text and the answer."""
    template = processor.chat_template or processor.tokenizer.chat_template
    mark = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return [*text_around(processor.tokenizer, template, mark)[1]]


@torch.inference_mode()
def scout_states(
    language_model: Any,  # noqa: ANN401  # Hugging Face's, of any family
    prefix: Sequence[int],
    embeds: Float[Tensor, "s n d"],
    layers: int,
    arguments: Mapping[str, object] | None = None,
    *,
    with_maps: bool = True,
) -> Float32[Tensor, "s n d"]:
    """Return the output of layer ``layers``, from 1, for pictures alone.

    Args:
        language_model: Takes embeddings; has ``layers`` and ``norm``.
        prefix: Token ids before each picture.
        embeds: Of the pictures, as the projector gives them.
        arguments: Further ones of the model, for prefix and picture (positions, feature maps).
        with_maps: With what the model adds behind the layer, as the next one reads it.

    Raises:
        UnsupportedError: the model has fewer layers, or was loaded without.
    """
    if layers > len(language_model.layers):
        raise UnsupportedError(
            f"scout: got {layers} layers, allowed: up to {len(language_model.layers)}, those that "
            "the language model was loaded with"
        )
    found: list[Tensor] = []

    def out_of(_: nn.Module, __: object, output: Any) -> None:  # noqa: ANN401
        found.append(output[0] if isinstance(output, tuple) else output)

    if with_maps:
        hook = listen([*language_model.layers, language_model.norm][layers], found.append)
    else:
        hook = language_model.layers[layers - 1].register_forward_hook(out_of)
    before = language_model.get_input_embeddings()(torch.tensor([list(prefix)], dtype=torch.int64))
    given = torch.cat([before.to(embeds.dtype).expand(len(embeds), -1, -1), embeds], 1)
    try:
        language_model(inputs_embeds=given, use_cache=False, **(arguments or {}))
    finally:
        hook.remove()
    return found[0][:, len(prefix) :].float()


@torch.inference_mode()
def scout_relevance(
    language_model: Any,  # noqa: ANN401
    prefix: Sequence[int],
    embeds: Float[Tensor, "n d"],
    question: Question,
    config: EraConfig,
    arguments: Mapping[str, object] | None = None,
) -> Float32[Tensor, "n"]:
    """Return how much a question's words attend to a picture's tokens in the scout's last layer.

    The model, loaded with eager attention, runs on prefix, picture and question. 0 where nothing
    is asked.

    Args:
        config: ``scout`` and ``question_reduction``.
        arguments: Further ones of the model, for all of it.
    """
    if not question:
        return torch.zeros(len(embeds))
    table = language_model.get_input_embeddings()
    before, words = (table(torch.tensor([*ids], dtype=torch.int64)) for ids in (prefix, question))
    given = torch.cat([before.to(embeds.dtype), embeds, words.to(embeds.dtype)])[None]
    out = language_model(
        inputs_embeds=given, use_cache=False, output_attentions=True, **(arguments or {})
    )
    each = out.attentions[config.scout - 1][0].float().mean(0)
    each = each[-len(question) :, len(prefix) : len(prefix) + len(embeds)]
    return each.amax(0) if config.question_reduction == "largest" else each.mean(0)


def listen(module: nn.Module, keep: Callable[[Tensor], None]) -> RemovableHandle:
    """Have the states kept that a decoder layer, or the norm behind the last, is given."""

    def given(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(given, with_kwargs=True)


def scout_signals(
    language_model: Any,  # noqa: ANN401
    prefix: Sequence[int],
    embeds: Float[Tensor, "s n d"],
    config: EraConfig,
) -> tuple[dict[Signal, Tensor], Float[Tensor, "s n k_d"] | None]:
    """Return what the first layers make of pictures alone, as far as the settings need it.

    Returns: signals, and with ``scout_injection`` the output of each layer.
    """
    layer = query_layer(make_policy(config))
    found: dict[Signal, Tensor] = {}
    if config.scout:
        states = scout_states(language_model, prefix, embeds, config.scout)
        found[Signal.SCOUT_STATES] = states.transpose(1, 2)
    if layer > 1:
        below = scout_states(language_model, prefix, embeds, layer - 1).to(embeds.dtype)
        found |= first_queries(language_model.layers[layer - 1 :], below)
    if not config.scout_injection:
        return found, None
    layers = range(1, config.scout + 1)
    of_layers = [scout_states(language_model, prefix, embeds, index) for index in layers]
    return found, torch.cat(of_layers, -1).to(embeds.dtype)


def first_queries(
    layers: nn.ModuleList, embeds: Float[Tensor, "s n d"]
) -> dict[Signal, Float32[Tensor, "s hq dh n"]]:
    """Return the queries of a Hugging Face language model's first layer, if it has one."""
    if not len(layers):
        return {}
    return {Signal.LANGUAGE_QUERIES: heads_of(layers[0], "q", embeds).permute(0, 2, 3, 1)}


def heads_of(
    layer: Any,  # noqa: ANN401
    name: Literal["q", "k"],
    states: Float[Tensor, "*s n d"],
) -> Float32[Tensor, "*s n h dh"]:
    """Return a decoder layer's queries or keys, before positions."""
    rows = getattr(layer.self_attn, f"{name}_proj")(layer.input_layernorm(states))
    rows = rows.unflatten(-1, (-1, layer.self_attn.head_dim))
    norm = getattr(layer.self_attn, f"{name}_norm", None)
    return (rows if norm is None else norm(rows)).float()


def replace_output(
    layer: nn.Module, at: Int[Tensor, "v"], states: Float[Tensor, "v d"]
) -> RemovableHandle:
    """Have a decoder layer come out with other states for some of its tokens."""

    def replaced(_: nn.Module, __: object, output: Any) -> Any:  # noqa: ANN401
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        hidden = hidden.clone()
        hidden[0, at] = states
        return (hidden, *rest) if isinstance(output, tuple) else hidden

    return layer.register_forward_hook(replaced)
