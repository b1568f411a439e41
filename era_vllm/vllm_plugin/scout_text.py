"""What stands around a picture and its question in the scout: token ids, worked out at the start.

A causal layer sees what is before a token, so that the scout's states are the engine's own where
the same text stands before its picture: the fixed text of the model's chat template, which all
prompts of a chat share. What the template writes behind a user's text, up to where the answer
begins, follows a question: a model gathers there what it is about to say, and so looks where that
is to be seen. Carried in the settings, and so in every cache key. Leaves out the scout
(``signals/scout.py``).
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from era_vllm import chat_text
from era_vllm.config import EraConfig
from era_vllm.contracts import query_layer
from era_vllm.errors import ConfigError
from era_vllm.policies import make_policy
from era_vllm.vllm_plugin.families import family_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def layers_read(config: EraConfig) -> int:
    """Return how many layers of the language model are run on pictures alone; 0 = none."""
    read = query_layer(make_policy(config))
    return max(config.scout, read if read > 1 else 0)


def with_text(
    model_config: "ModelConfig", config: EraConfig, template: str | None = None
) -> EraConfig:
    """Return settings that have the text around a picture and its question, as far as needed.

    Args:
        model_config: Of the engine, or of a stock one for the same model.
        config: Of which ``layers_read`` is not 0. What it says already stays.
        template: A chat template, text or file, that prompts are rendered with in place of the
            model's own.

    Raises:
        ConfigError: nothing to be worked out; see ``text_around``.
    """
    wanted = ["scout_prefix", *(["scout_suffix"] if config.scout and config.question_aware else [])]
    missing = [name for name in wanted if getattr(config, name) is None]
    if not missing:
        return config
    found = dict(
        zip(("scout_prefix", "scout_suffix"), text_around(model_config, template), strict=True)
    )
    return replace(config, **{name: found[name] for name in missing})


def text_around(
    model_config: "ModelConfig", template: str | None = None
) -> tuple[chat_text.Ids, chat_text.Ids]:
    """Return what stands before the first picture of a user's first message, and behind the
    message's text, up to the answer.

    That is what the chat template writes, and before a picture what the family's processor does.
    The beginning-of-text token and nothing for a model without a template; nothing at all where it
    has no such token.

    Args:
        template: As for ``with_text``.

    Raises:
        ConfigError: no tokenizer, or a template that does not render a user's message.
    """
    from vllm.renderers.chat_utils import load_chat_template
    from vllm.renderers.hf import resolve_chat_template
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer: Any = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        raise _refusal("an engine without a tokenizer (skip_tokenizer_init)")
    given = load_chat_template(template)
    template = resolve_chat_template(tokenizer, given, None, model_config=model_config)
    opening = family_of(model_config.hf_config).opening
    opened = tuple(map(int, tokenizer.encode(opening, add_special_tokens=False)))
    if template is None:
        first = tokenizer.bos_token_id
        return (*(() if first is None else (int(first),)), *opened), ()
    mark = getattr(model_config.hf_config, "image_token_id", None)
    try:
        before, behind = chat_text.text_around(tokenizer, template, mark)
    except ValueError as error:
        raise _refusal(f"a chat template that renders {error}") from error
    return (*before, *opened), behind


def _refusal(got: str) -> ConfigError:
    return ConfigError(
        f"scout_prefix: got {got}, needed what stands before a picture in a prompt; give the "
        "token ids with --era-scout-prefix '[1, ...]' (with --era-question-aware also "
        "--era-scout-suffix)"
    )
