"""What stands around a picture and its question in the scout: token ids, worked out at the start.

A causal layer sees what is before a token, so that the scout's states are the engine's own where
the same text stands before its picture: the fixed text of the model's chat template, which all
prompts of a chat share. What the template writes behind a user's text, up to where the answer
begins, follows a question: a model gathers there what it is about to say, and so looks where that
is to be seen. Carried in the settings, and so in every cache key. Leaves out the scout
(``signals/scout.py``); a template given to a server is not seen here.
"""

from typing import TYPE_CHECKING, Any

from era_vllm import chat_text
from era_vllm.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def text_around(model_config: "ModelConfig") -> tuple[chat_text.Ids, chat_text.Ids]:
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
    try:
        return chat_text.text_around(tokenizer, template, mark)
    except ValueError as error:
        raise _refusal(f"a chat template that renders {error}") from error


def _refusal(got: str) -> ConfigError:
    return ConfigError(
        f"scout_prefix: got {got}, needed what stands before a picture in a prompt; give the "
        "token ids with --era-scout-prefix '[1, ...]' (with --era-question-aware also "
        "--era-scout-suffix)"
    )
