"""A prompt holds K placeholders for an item of N before anything is encoded.

So scheduler, KV cache, prefix cache and usage all see K. Mixed into a model family's own processor:
the plan of each item is made once, at the top of ``apply``, and rides on the arguments that vLLM
hands from hook to hook, in which no key of ours is left for Hugging Face to stumble over.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import ClassVar

from torch import Tensor
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
)
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdate

from era_vllm.config import EraConfig
from era_vllm.contracts import ModelAdapter
from era_vllm.layout import Layout
from era_vllm.pixels import pixel_hash
from era_vllm.plan import Plan, plan
from era_vllm.question import MOST
from era_vllm.vllm_plugin.cache_keys import pruned_hashes
from era_vllm.vllm_plugin.families import Family, family_of
from era_vllm.vllm_plugin.fields import field, names, pack_items
from era_vllm.vllm_plugin.layouts import Layouts
from era_vllm.vllm_plugin.names import RATES
from era_vllm.vllm_plugin.packing import MOST_OFFSETS
from era_vllm.vllm_plugin.positions import table_rows
from era_vllm.vllm_plugin.rates import effective_rates, questions, without_rates
from era_vllm.vllm_plugin.resolve import era_config
from era_vllm.vllm_plugin.thin import thinned
from era_vllm.vllm_plugin.trained_range import bounded

TOKENS_BEFORE = "era_tokens_before"
"""Key of a processed prompt, which the renderer takes out again: modality -> N of each item."""
QUESTION_TOKENS = "era_question_tokens"
"""Likewise: modality -> tokens of the question that each item is pruned for."""

Plans = Mapping[str, Sequence[Plan]]
"""Modality -> the plan of each of its items."""


class PlannedKwargs(dict[str, object]):
    """Arguments of a Hugging Face processor, with the plans of the items that they are for."""

    def __init__(self, kwargs: Mapping[str, object], plans: Plans) -> None:
        super().__init__(kwargs)
        self.plans = plans


class DummyKwargs(dict[str, object]):
    """Arguments of what memory is profiled with, which may be longer than a prompt."""


class PrunedInfoMixin:
    """Over a family's ``ProcessingInfo``: the encoder still works on N tokens an item."""

    adapter: ClassVar[ModelAdapter]

    @cached_property
    def era(self) -> EraConfig:
        """The engine's settings."""
        return era_config(self.ctx.model_config.hf_config)

    @cached_property
    def family(self) -> Family:
        """What is known of the family."""
        return family_of(self.ctx.model_config.hf_config)

    @cached_property
    def layout(self) -> Layouts:
        """``layout(modality, shape)``: where an item's tokens stand unpruned."""
        return Layouts(self.adapter, self.ctx.model_config.hf_config, self.era)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Take what is pruned, and nothing else: an item could slip in without a bias."""
        limits = super().get_supported_mm_limits()
        return {name: limit for name, limit in limits.items() if name in self.family.modalities}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Budget the encoder for an item at rate 0, which any request may ask for.

        vLLM profiles memory with the modality that has most tokens here: the one that the tower
        works most for, so that one may be said to have a token more than it has.
        """
        largest = self._layouts(self.adapter.max_shape, seq_len, mm_counts)
        tokens = {modality: layout.length for modality, layout in largest.items()}
        work = self.most_work(seq_len, mm_counts)
        busiest = max(work, key=lambda modality: work[modality], default=None)
        if busiest is not None and tokens[busiest] < max(tokens.values()):
            tokens[busiest] = max(tokens.values()) + 1
        return tokens

    def most_work(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the tokens that the tower makes for the largest item, padding included."""
        busiest = self._layouts(self.adapter.busiest_shape, seq_len, mm_counts)
        return {modality: layout.work for modality, layout in busiest.items()}

    @cached_property
    def busiest(self) -> Mapping[str, Layout]:
        """By modality the item that the tower works most for, which memory was profiled with."""
        context = self.ctx.model_config.max_model_len
        return {
            modality: self._layouts(self.adapter.busiest_shape, context, {modality: 1})[modality]
            for modality in self.family.modalities
        }

    def _layouts(
        self,
        shape: Callable[[object, str, int, Mapping[str, int]], tuple[int, ...]],
        seq_len: int,
        mm_counts: Mapping[str, int],
    ) -> dict[str, Layout]:
        return {
            modality: self.layout(modality, shape(self, modality, seq_len, mm_counts))
            for modality in self.family.modalities
            if mm_counts.get(modality, 1)
        }


class PrunedProcessorMixin(BaseMultiModalProcessor):
    """Over a family's processor: K placeholders, per-item rates, per-item identity."""

    def apply(self, inputs, timing_ctx):  # noqa: ANN001, ANN201  # vLLM's signature
        """Do what vLLM does with items that are planned, and say how large each was.

        Refuses before it what cannot be served, since what is raised within leaves vLLM's sender
        cache ahead of its receiver, and the next request with the same item comes back empty.
        """
        given, items = inputs.hf_processor_mm_kwargs, inputs.mm_data_items
        own = without_rates(given)
        pruned = {name: items[name] for name in self.info.family.modalities if name in items}
        for modality, of_modality in pruned.items():
            _refuse_names_alone(of_modality, modality)
            self._check_placeholders(inputs.prompt, modality, of_modality.get_count())
        plans = self._plans(pruned, given, own)
        checked = self.info.era.positions == "original" and not isinstance(given, DummyKwargs)
        if plans and checked:
            layouts = [one.layout for some in plans.values() for one in some]
            longer = sum(sum(layout.spans) for layout in layouts) - len(layouts)
            self._check_length(len(inputs.prompt) + longer)
        inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=PlannedKwargs(own, plans))
        result = super().apply(inputs, timing_ctx)
        if not plans:
            return result
        result[TOKENS_BEFORE] = {
            modality: [one.layout.length for one in some] for modality, some in plans.items()
        }
        if self.info.era.question_aware:
            result[QUESTION_TOKENS] = {
                modality: [len(one.question) for one in some] for modality, some in plans.items()
            }
        every = [one for some in plans.values() for one in some]
        ahead = sum(sum(one.layout.spans) - sum(one.kept) for one in every)
        if checked:  # with the texts that a family writes around and between runs
            self._check_length(len(result["prompt_token_ids"]) + ahead)
        if checked and not self.info.era.allow_extrapolation:
            text = self.info.get_hf_config().get_text_config()
            result["mm_hashes"] = bounded(result["mm_hashes"], ahead, text)
        return result

    def get_dummy_inputs(self, *args, **kwargs):  # noqa: ANN002, ANN003, ANN201  # vLLM's signature
        """Profile memory with items at the lowest rate served: most rows in the encoder cache."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        lowest = {**inputs.hf_processor_mm_kwargs, RATES: self.info.era.min_pruning_rate}
        return dataclasses.replace(inputs, hf_processor_mm_kwargs=DummyKwargs(lowest))

    def _plans(
        self,
        items: Mapping[str, ModalityDataItems],
        given: Mapping[str, object],
        own: Mapping[str, object],
    ) -> Plans:
        counts = {modality: some.get_count() for modality, some in items.items()}
        rates = effective_rates(given, counts, self.info.era)
        plans = dict[str, list[Plan]]()
        for modality, some in items.items():
            layouts = [
                self.info.layout(modality, self._shape(modality, some, index, own))
                for index in range(counts[modality])
            ]
            if any(max(layout.spans) > MOST_OFFSETS for layout in layouts):
                raise VLLMValidationError(
                    f"{modality}: got more than {MOST_OFFSETS} positions from its first token to "
                    "its last, which is what an anchor can carry; send a shorter one",
                    parameter=modality,
                )
            if not isinstance(given, DummyKwargs):
                self._check_work(modality, layouts)
            plans[modality] = [
                plan(layout, rate, self.info.era)
                for layout, rate in zip(layouts, rates[modality], strict=True)
            ]
            if self.info.era.question_aware:
                plans[modality] = _with_questions(plans[modality], given, modality)
        return {modality: some for modality, some in plans.items() if some}

    def _shape(
        self, modality: str, items: ModalityDataItems, index: int, own: Mapping[str, object]
    ) -> tuple[int, ...]:
        """Return an item's shape; what vLLM would stumble over later is said here."""
        try:
            return self.info.adapter.item_shape(self.info, modality, items, index, own)
        except VLLMValidationError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise VLLMValidationError(
                f"{modality} {index}: its size cannot be told with the options of the processor "
                f"that were given ({type(error).__name__}: {error}); leave them out",
                parameter=modality,
            ) from error

    def _check_work(self, modality: str, layouts: Sequence[Layout]) -> None:
        """Refuse an item that the tower needs more memory for than was profiled."""
        busiest = self.info.busiest[modality]
        for layout in layouts:
            if layout.work > busiest.work:
                units, instead = ("tiles", "send it smaller")
                if modality == "video":
                    units = "frames"
                    instead = (
                        "send it smaller, sample fewer, or have the server sample more "
                        "(num_frames of --media-io-kwargs) within a longer --max-model-len"
                    )
                raise VLLMValidationError(
                    f"{modality}: got {layout.work} tokens in {layout.units} {units}, allowed: "
                    f"{busiest.work}; {instead}",
                    parameter=modality,
                )

    def _check_placeholders(self, prompt: str | Sequence[int], modality: str, items: int) -> None:
        """Refuse a prompt from which items' marks were cut, which vLLM takes for a fault."""
        if isinstance(prompt, str) or not items:
            return
        mark = list(self.info.adapter.mark(self.info, modality))
        starts = (at for at, token in enumerate(prompt) if token == mark[0])
        found = (
            prompt.count(mark[0])
            if len(mark) == 1
            else sum(list(prompt[at : at + len(mark)]) == mark for at in starts)
        )
        if found < items and len(mark) > 1:  # its tokens may have merged with their neighbours
            tokenizer = self.info.get_tokenizer()
            found = tokenizer.decode(prompt).count(tokenizer.decode(mark))
        if found >= items:
            return
        raise VLLMValidationError(
            f"the prompt has {found} places for {items} {modality}s; leave truncate_prompt_tokens "
            "out, or make it larger; offline, write one mark for each",
            parameter="truncate_prompt_tokens",
        )

    def _check_length(self, length: int) -> None:
        """Refuse a prompt that would reach past the rotary table."""
        allowed = table_rows(self.info.get_hf_config().get_text_config())
        if length > allowed:
            raise VLLMValidationError(
                f"the prompt is {length} tokens long before pruning, and with original positions "
                f"the model allows {allowed}; shorten it, or serve with --era-positions compact",
                parameter="prompt",
                value=length,
            )

    def _get_mm_hashes(self, inputs):  # noqa: ANN001, ANN202  # vLLM's signature
        plans = inputs.hf_processor_mm_kwargs.plans
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        return {
            modality: pruned_hashes(
                hashes, plans[modality], self.info.era, self.info.family, algorithm, modality
            )
            if modality in plans
            else hashes
            for modality, hashes in super()._get_mm_hashes(inputs).items()
        }

    def _get_cache_missing_processor_kwargs(self, inputs, mm_is_cached):  # noqa: ANN001, ANN202
        own = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        missing = {
            modality: [
                one for one, hit in zip(some, mm_is_cached[modality], strict=True) if not hit
            ]
            for modality, some in inputs.hf_processor_mm_kwargs.plans.items()
        }
        return PlannedKwargs(own, missing)

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        """Do what vLLM does, and put beside the pixels what model and runner need.

        Here and not in ``_call_hf_processor``, which some families go round.
        """
        processed = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        for plans in hf_kwargs.plans.values():
            self._cut_padding(processed, plans)
        for modality, plans in hf_kwargs.plans.items():
            self._check_shapes(processed, modality, plans)
        stock = super()._get_mm_fields_config(processed, hf_kwargs)
        for modality, plans in hf_kwargs.plans.items():
            if not plans:
                continue
            fields = {name: config for name, config in stock.items() if config.modality == modality}
            items = MultiModalKwargsItems.from_hf_inputs(processed, fields)[modality]
            hashes = [pixel_hash(pixels_of(item)) for item in items]
            aware = self.info.era.question_aware
            processed.update(pack_items(plans, hashes, modality, question_aware=aware))
        return processed

    def _check_shapes(self, processed: BatchFeature, modality: str, plans: Sequence[Plan]) -> None:
        """Refuse an item that transformers takes for another size than vLLM: an array's axes."""
        config = self.info.ctx.model_config.hf_config
        made = self.info.adapter.made_shapes(config, modality, processed) if plans else None
        for shape, one in () if made is None else zip(made, plans, strict=True):
            if shape != one.layout.shape:
                instead = "a PIL picture" if modality == "image" else "frames as uint8 [t, h, w, 3]"
                raise VLLMValidationError(
                    f"{modality}: got one of {_sizes(one.layout.shape)} by vLLM's reading of its "
                    f"axes and options, and {_sizes(shape)} by transformers'; send {instead}, "
                    "without options of the processor that change its size",
                    parameter=modality,
                )

    def _cut_padding(self, processed: BatchFeature, plans: Sequence[Plan]) -> None:
        """Give each item its own rows. Mutates: processed."""
        own = [self.info.adapter.unpadded_rows(plan.layout) for plan in plans]
        for name in own[0] if own else ():
            pairs = zip(processed[name], own, strict=True)
            processed[name] = [
                rows if len(rows) == counts[name] else rows[: counts[name]].clone()
                for rows, counts in pairs
            ]

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        ours = {
            field(name, modality): MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
            for modality in self.info.family.modalities
            for name in names(question_aware=self.info.era.question_aware)
        }
        return {**super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs), **ours}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        plans = hf_processor_mm_kwargs.plans
        return [
            thinned(update, plans[update.modality])
            for update in super()._get_prompt_updates(
                mm_items, hf_processor_mm_kwargs, out_mm_kwargs
            )
            if plans.get(update.modality)
        ]


def _with_questions(
    plans: Sequence[Plan], given: Mapping[str, object], modality: str
) -> list[Plan]:
    """Return plans with what is asked of each item; of one that stays whole it does not matter."""
    if isinstance(given, DummyKwargs):
        return [dataclasses.replace(one, question=(0,) * MOST) for one in plans]
    asked = questions(given).get(modality, [()] * len(plans))
    return [
        one if one.whole else dataclasses.replace(one, question=tuple(question))
        for one, question in zip(plans, asked, strict=True)
    ]


def _sizes(shape: Sequence[int]) -> str:
    more = len(shape) - 3  # of a video: each frame's place on the time axis
    return " x ".join(map(str, shape[:3])) + (f" and {more} more" if more > 0 else "")


def pixels_of(item: MultiModalKwargsItem) -> Tensor:
    """Return an item's pixels as the tower is given them."""
    return next(
        element.data
        for name, element in item.items()
        if name.startswith("pixel_values") and isinstance(element.data, Tensor)
    )


def _refuse_names_alone(items: ModalityDataItems, modality: str) -> None:
    """Refuse an item that is only named: its tokens must be counted before caches are asked."""
    if any(items.get(index) is None for index in range(items.get_count())):
        what = "picture" if modality == "image" else modality
        raise VLLMValidationError(
            f"{modality} uuid: got one without its {what}, which a server that prunes cannot "
            f"count; send the {what} beside it",
            parameter="uuid",
        )
