"""What stands around a picture and its question in the scout: token ids, worked out at the start.

A causal layer sees what is before a token, so that the scout's states are the engine's own where
the same text stands before its picture: the fixed text of the model's chat template, which all
prompts of a chat share. What the template writes behind a user's text, up to where the answer
begins, follows a question: a model gathers there what it is about to say, and so looks where that
is to be seen. Carried in the settings, and so in every cache key. Leaves out the scout
(``signals/scout.py``); a template given to a server is not seen here.
"""

from typing import TYPE_CHECKING, Any, Final

from era_vllm.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_TEXT: Final = "scout"
"""A user's text, where the template puts the picture as vLLM does: in front of it."""


Ids = tuple[int, ...]


def text_around(model_config: "ModelConfig") -> tuple[Ids, Ids]:
    """Return what the chat template writes before the first picture of a user's first message, and
    behind the message's text, up to the answer.

    The beginning-of-text token and nothing for a model without a template; nothing at all where it
    has no such token.

    Raises:
        ConfigError: no tokenizer, or a template that does not render a user's message.
    """
    from vllm.renderers.hf import resolve_chat_template
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer: Any = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        raise _refusal("an engine without a tokenizer (skip_tokenizer_init)")
    template = resolve_chat_template(tokenizer, None, None, model_config=model_config)
    if template is None:
        first = tokenizer.bos_token_id
        return (() if first is None else (int(first),)), ()
    mark = getattr(model_config.hf_config, "image_token_id", None)
    parts = [{"type": "image"}, {"type": "text", "text": _TEXT}]
    found: Exception | None = None
    for content in (parts, _TEXT):
        messages = [{"role": "user", "content": content}]
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template's own, of any kind
            found = error
            continue
        if _TEXT not in text:
            continue
        ids = _encoded(tokenizer, text)
        before, after = (text[: place(_TEXT)] for place in (text.index, text.rindex))
        behind = _behind(ids, _encoded(tokenizer, after + _TEXT))
        if mark in ids:
            return tuple(ids[: ids.index(mark)]), behind
        if content == _TEXT:
            return tuple(_encoded(tokenizer, before)), behind
    raise _refusal("a chat template that does not render a user's message") from found


def _behind(ids: list[int], begin: list[int]) -> Ids:
    """Return the ids behind those that a text begins with, whose last may have been cut."""
    same = next(
        (at for at, pair in enumerate(zip(ids, begin, strict=False)) if pair[0] != pair[1]),
        len(begin),
    )
    return tuple(ids[same:])


def _encoded(tokenizer: Any, text: str) -> list[int]:  # noqa: ANN401  # transformers'
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]


def _refusal(got: str) -> ConfigError:
    return ConfigError(
        f"scout_prefix: got {got}, needed what stands before a picture in a prompt; give the "
        "token ids with --era-scout-prefix '[1, ...]' (and --era-scout-suffix with questions)"
    )
