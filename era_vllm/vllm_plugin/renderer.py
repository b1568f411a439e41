"""The renderer behind ``--tokenizer-mode era``: vLLM's own, plus one effective rate an item.

Every kind of request passes here after vLLM has refused what clients may not send, so this is
where rates are made explicit, and where a bad one becomes an HTTP 400 before any work is done.
What was done with each item goes back into the request's context.
"""

import copy
from collections.abc import Mapping, Sequence, Sized
from functools import cached_property, partial
from typing import Final

from PIL.Image import Image
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from era_vllm import question
from era_vllm.compat import input_processor
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.vllm_plugin.cache_keys import namespace
from era_vllm.vllm_plugin.families import family_of
from era_vllm.vllm_plugin.names import QUESTIONS, RATES
from era_vllm.vllm_plugin.parts import (
    PartFields,
    fields_of_items,
    placed_parts,
    texts_of_items,
    with_lists,
    without_field,
)
from era_vllm.vllm_plugin.processor import QUESTION_TOKENS, TOKENS_BEFORE
from era_vllm.vllm_plugin.rates import effective_rates, has_rates, question_aware
from era_vllm.vllm_plugin.requests import (
    FIELD,
    ItemRate,
    current,
    item_rates,
    reports,
)
from era_vllm.vllm_plugin.resolve import era_config
from era_vllm.vllm_plugin.trained_range import end_in_time

_PART_FIELDS = "era_part_fields"
_TEXTS = "era_texts"
_ITEM_RATES = "era_rates"
"""Keys of a prompt on its way through the renderer, which vLLM leaves alone."""
_AXES: Final = {"image": 3, "video": 4}
"""Modality -> axes of an array that is one item."""
_PARTS: Final = {"image": "image_url or input_image", "video": "video_url"}
"""Modality -> types of a part that is one item."""
_MOST_PIXELS: Final = 2**24
"""Larger pictures of a request are not kept until the engine has begun to answer it."""
_MOST_VIDEO_PIXELS: Final = 2**26
"""Of a request with videos: 32 frames of 1920 x 1080."""
RENDER: Final = "era_render"
"""Key of an engine's input that counts on a picture which the engine was sent before: a function
that renders the prompt anew. Whoever gives the input to the engine takes it out."""


class EraRenderer(HfRenderer):
    """vLLM's Hugging Face renderer that puts the list of rates on each prompt with images."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        input_processor.then(end_in_time)
        if self.era.question_aware and self.mm_processor is not None:
            # vLLM's own is another thread's, and a fast tokenizer is one caller's at a time
            self._tokenizer = copy.deepcopy(self.get_tokenizer())
            self._special_ids = question.special_ids(self._tokenizer)
            info = self.get_mm_processor().info
            taken = [name for name in info.family.modalities if info.allowed_mm_limits.get(name)]
            self._marks = {name: info.adapter.mark(info, name) for name in taken}

    @cached_property
    def era(self) -> EraConfig:
        """The engine's settings."""
        return era_config(self.model_config.hf_config)

    def render_messages(self, messages, params):  # noqa: ANN001, ANN201  # vLLM's signature
        """Do what vLLM does, and keep what each item's part says of it, which vLLM drops."""
        messages = with_lists(messages)
        conversation, prompt = super().render_messages(without_field(messages), params)
        prompt |= self._fields_of(messages)
        return conversation, prompt

    async def render_messages_async(self, messages, params):  # noqa: ANN001, ANN201
        """Do the same for a server."""
        messages = with_lists(messages)
        bare = without_field(messages)
        conversation, prompt = await super().render_messages_async(bare, params)
        prompt |= self._fields_of(messages)
        return conversation, prompt

    def _fields_of(self, messages: list[object]) -> dict[str, object]:
        """Return what messages say of their items, as keys of a prompt."""
        said: dict[str, object] = {_PART_FIELDS: _part_fields(messages)}
        return {**said, _TEXTS: texts_of_items(messages)} if self.era.question_aware else said

    def _apply_prompt_extras(
        self, prompts: list[dict[str, object]], prompt_extras: dict[str, object] | None
    ) -> None:
        """Do what vLLM does, then replace each prompt by one that carries its namespace and rates.

        Mutates: prompts, the list; not the prompts in it, which may be the caller's own.
        """
        if RATES in ((prompt_extras or {}).get("mm_processor_kwargs") or {}) and current():
            raise VLLMValidationError(  # where --trust-request-mm-kwargs lets it through
                f"mm_processor_kwargs.{RATES}: a request says how much to prune by its field "
                f"{FIELD!r}; leave the argument out",
                parameter=f"mm_processor_kwargs.{RATES}",
            )
        super()._apply_prompt_extras(prompts, prompt_extras)
        family = family_of(self.model_config.hf_config)
        for row, prompt in enumerate(prompts):
            salt = namespace(self.era, family, prompt.get("cache_salt"))
            prompts[row] = {**prompt, "cache_salt": salt, **self._rates(prompt)}

    def _rates(self, prompt: dict[str, object]) -> dict[str, object]:
        """Return what a prompt needs for its items to be pruned; nothing where it has none."""
        data = prompt.get("multi_modal_data")
        counts = {
            modality: _count(data[modality], axes)
            for modality, axes in _AXES.items()
            if isinstance(data, dict) and data.get(modality) is not None
        }
        if not counts:
            return {}
        given = prompt.get("mm_processor_kwargs")
        kwargs = dict(given) if isinstance(given, dict) else {}
        try:
            aware = question_aware(kwargs, self.era)
            rates = self._item_rates(kwargs, prompt.get(_PART_FIELDS), counts)
            questions = self._questions(prompt, counts) if aware else {}
        except ConfigError as error:
            field = getattr(error, "field", f"mm_processor_kwargs.{RATES}")
            raise VLLMValidationError(str(error), parameter=field) from error
        kwargs[RATES] = {
            modality: [rate.pruning_rate for rate in some] for modality, some in rates.items()
        }
        if questions:
            kwargs[RATES][QUESTIONS] = questions
        return {"mm_processor_kwargs": kwargs, _ITEM_RATES: rates}

    def _item_rates(
        self,
        kwargs: dict[str, object],
        fields: Mapping[str, Sequence[PartFields]] | None,
        counts: Mapping[str, int],
    ) -> dict[str, list[ItemRate]]:
        explicit = effective_rates(kwargs, counts, self.era)
        if has_rates(kwargs):
            some = (one for each in (fields or {}).values() for one in each)
            if beside := next((one for one in some if one.era is not None), None):
                raise ConfigError(
                    f"{beside.place(FIELD)}: got it beside mm_processor_kwargs.{RATES}, which says "
                    "the rates of the whole prompt; leave one of them out"
                )
            return {
                modality: [ItemRate(rate, "era") for rate in some]
                for modality, some in explicit.items()
            }
        request = current()
        asked = request.rates if request else {}
        found = dict[str, list[ItemRate]]()
        for modality, kinds in _PARTS.items():
            count = counts.get(modality, 0)
            each = [None] * count if fields is None else fields[modality]
            if len(each) != count:
                raise ConfigError(
                    f"messages: got {count} {modality}s, but {len(each)} parts that are one; send "
                    f"each as a part of type {kinds}"
                )
            if modality in counts:
                found[modality] = item_rates(each, asked.get(modality), self.era)
        return found

    def _questions(
        self, prompt: Mapping[str, object], counts: Mapping[str, int]
    ) -> dict[str, list[question.Question]]:
        """Return what is asked of each item; nothing where a request wants none."""
        request = current()
        if request is not None and not request.question_aware:
            return {}
        texts = request.questions if request is not None else None
        if texts is None:
            texts = prompt.get(_TEXTS)
        ids, special = prompt.get("prompt_token_ids"), self._special_ids
        if texts is not None:
            distinct = {text for modality in counts for text in texts[modality]}
            known = {text: question.of_text(text, self._tokenizer, special) for text in distinct}
            return {modality: [known[text] for text in texts[modality]] for modality in counts}
        try:
            suffix = self.era.scout_suffix or ()
            return question.of_prompt(ids, self._marks, counts, self._tokenizer, special, suffix)
        except LookupError as error:
            raise ConfigError(
                f"the prompt has {error}, so that what is asked of each cannot be told; write one "
                f'mark for each, or set mm_processor_kwargs={{"{RATES}": {{"question_aware": '
                "False}}"
            ) from error

    def process_for_engine(self, prompt, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN201
        """Do what vLLM does, and report what was done with the items."""
        inputs = super().process_for_engine(prompt, *args, **kwargs)
        self._report(prompt, inputs, **kwargs)
        return inputs

    async def process_for_engine_async(self, prompt, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN201
        """Do the same for a server."""
        request = current()
        if request is not None and request.only_counted:
            kwargs["skip_mm_cache"] = True
        inputs = await super().process_for_engine_async(prompt, *args, **kwargs)
        self._report(prompt, inputs, **kwargs)
        known = any(None in some for some in inputs.get("mm_kwargs", {}).values())
        videos = inputs.get("mm_kwargs", {}).get("video", ())
        most = _MOST_VIDEO_PIXELS if videos else _MOST_PIXELS
        if known and request is not None and request.pixels <= most:
            inputs[RENDER] = partial(self._process_again, prompt, *args, **kwargs)
        return inputs

    async def _process_again(self, prompt, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        """Do what vLLM does, for a prompt that was reported."""
        inputs = await super().process_for_engine_async(prompt, *args, **kwargs)
        for name in (TOKENS_BEFORE, QUESTION_TOKENS):
            inputs.pop(name, None)
        return inputs

    def _report(
        self,
        prompt: dict[str, object],
        inputs: dict[str, object],
        *,
        skip_mm_cache: bool = False,
        **_: object,
    ) -> None:
        """Tell the request's context, unless the prompt is not for the engine (tokenize, render).

        Mutates: inputs, which lose what is ours.
        """
        before, request = inputs.pop(TOKENS_BEFORE, None), current()
        asked = inputs.pop(QUESTION_TOKENS, {})
        if before is None or request is None or skip_mm_cache:
            return
        places = inputs["mm_placeholders"]
        after = {name: [place.get_num_embeds() for place in places[name]] for name in before}
        request.report(
            {
                modality: reports(
                    rates, before[modality], after[modality], self.era, asked.get(modality)
                )
                for modality, rates in prompt[_ITEM_RATES].items()
                if rates
            }
        )


def _part_fields(messages: list[object]) -> Mapping[str, Sequence[PartFields]]:
    """Return what each item's part says: as the route has read it, or from the messages."""
    request = current()
    given = request.part_fields if request is not None else None
    return fields_of_items(placed_parts(messages)) if given is None else given


def _count(items: object, axes: int) -> int:
    """Return how many items vLLM will make of what a prompt holds of a modality.

    Args:
        items: The value.
        axes: Of an array that is one.

    Upstream: vllm/multimodal/parse.py:753 ``_parse_image_data`` (0.32.0): a picture or an array of
    three axes is one, anything else a row of them; ``_parse_video_data``: so are an array of four,
    a list of pictures or of arrays that are, and a pair of frames and facts.
    """
    if getattr(items, "ndim", None) == axes or not isinstance(items, Sized):
        return 1
    if axes == _AXES["image"] or not len(items):
        return len(items)
    pair = isinstance(items, tuple) and len(items) == 2
    frames = isinstance(items, list) and all(
        isinstance(item, Image) or getattr(item, "ndim", None) == axes - 1 for item in items
    )
    return 1 if pair or frames else len(items)
