"""Placeholder counts: the prompt holds K tokens for an image of N before anything is encoded.

So scheduler, KV cache, prefix cache and usage all see K. Mixed into a model family's own
processor; the number K and the picture's hash travel to the model beside the pixels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptReplacement, PromptUpdate

from era_vllm.config import EraConfig
from era_vllm.pixels import pixel_hash
from era_vllm.vllm_plugin.cache_keys import pruned_hashes
from era_vllm.vllm_plugin.positions import table_rows
from era_vllm.vllm_plugin.rates import KEY, effective_rates, without_rates
from era_vllm.vllm_plugin.resolve import era_config
from era_vllm.vllm_plugin.trained_range import bounded

NUM_ANCHORS = "era_num_anchors"
PIXEL_HASH = "era_pixel_hash"
TOKENS_BEFORE = "era_tokens_before"
"""Key of a processed prompt, which the renderer takes out again."""


class PrunedInfoMixin:
    """Over a family's ``ProcessingInfo``: the encoder still works on N tokens an image."""

    @cached_property
    def era(self) -> EraConfig:
        """The engine's settings."""
        return era_config(self.ctx.model_config.hf_config)

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Budget the encoder for an image at rate 0, which any request may ask for."""
        return {"image": self.get_max_image_tokens()}


class PrunedProcessorMixin(BaseMultiModalProcessor):
    """Over a family's processor: K placeholders, per-image rates, per-image identity."""

    def apply(self, inputs, timing_ctx):  # noqa: ANN001, ANN201  # vLLM's signature
        """Do what vLLM does, and say how many tokens each image has from the encoder.

        Refuses before it what cannot be served, since what is raised within leaves vLLM's sender
        cache ahead of its receiver, and the next request with the same image comes back empty.
        """
        if "image" not in inputs.mm_data_items:
            return super().apply(inputs, timing_ctx)
        images = inputs.mm_data_items.get_items("image", ImageProcessorItems)
        _refuse_names_alone(images)
        self._check_placeholders(inputs.prompt, len(images))
        tokens = [self._num_tokens(images, item) for item in range(len(images))]
        if self.info.era.positions == "original":
            self._check_length(len(inputs.prompt) + sum(tokens) - len(tokens))
        result = super().apply(inputs, timing_ctx)
        result[TOKENS_BEFORE] = tokens
        if self.info.era.positions == "original" and not self.info.era.allow_extrapolation:
            kept = sum(place.length for place in result["mm_placeholders"]["image"])
            text = self.info.get_hf_config().get_text_config()
            result["mm_hashes"] = bounded(result["mm_hashes"], sum(tokens) - kept, text)
        return result

    def get_dummy_inputs(self, *args, **kwargs):  # noqa: ANN002, ANN003, ANN201  # vLLM's signature
        """Profile memory with images at the lowest rate served: most rows in the encoder cache."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        lowest = {**inputs.hf_processor_mm_kwargs, KEY: self.info.era.min_pruning_rate}
        return dataclasses.replace(inputs, hf_processor_mm_kwargs=lowest)

    def _check_placeholders(self, prompt: str | Sequence[int], images: int) -> None:
        """Refuse a prompt from which tokens of images were cut, which vLLM takes for a fault."""
        if isinstance(prompt, str):
            return
        found = prompt.count(self.info.get_hf_config().image_token_index)
        if found < images:
            raise VLLMValidationError(
                f"the prompt has {found} places for {images} images; leave truncate_prompt_tokens "
                "out, or make it larger",
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
        own = without_rates(inputs.hf_processor_mm_kwargs)
        stock = dataclasses.replace(inputs, hf_processor_mm_kwargs=own)
        hashes = dict(super()._get_mm_hashes(stock))
        if "image" in hashes:
            algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
            rates = self._rates(inputs.hf_processor_mm_kwargs, len(hashes["image"]))
            hashes["image"] = pruned_hashes(hashes["image"], rates, self.info.era, algorithm)
        return hashes

    def _get_cache_missing_processor_kwargs(self, inputs, mm_is_cached):  # noqa: ANN001, ANN202
        kwargs = dict(super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached))
        if cached := mm_is_cached.get("image"):
            rates = self._rates(kwargs, len(cached))
            kwargs[KEY] = [rate for rate, hit in zip(rates, cached, strict=True) if not hit]
        return kwargs

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        return super()._call_hf_processor(hf_data, without_rates(hf_kwargs))

    def _postprocess_hf_mm_data(
        self,
        mm_inputs: Mapping[str, object],
        hf_processor_mm_kwargs: Mapping[str, object],
        processed_data: BatchFeature,
    ) -> BatchFeature:
        own = without_rates(hf_processor_mm_kwargs)
        processed_data = super()._postprocess_hf_mm_data(mm_inputs, own, processed_data)
        pixels = processed_data.get("pixel_values")
        if pixels is None:
            return processed_data
        images = ImageProcessorItems(mm_inputs["images"])
        rates = self._rates(hf_processor_mm_kwargs, len(images))
        anchors = [self._num_anchors(images, i, rate) for i, rate in enumerate(rates)]
        processed_data[NUM_ANCHORS] = torch.tensor(anchors)
        processed_data[PIXEL_HASH] = torch.tensor([pixel_hash(image) for image in pixels])
        return processed_data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        own = without_rates(hf_processor_mm_kwargs)
        on_cpu = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        stock = super()._get_mm_fields_config(hf_inputs, own)
        return {**stock, NUM_ANCHORS: on_cpu, PIXEL_HASH: on_cpu}

    def _get_prompt_updates(
        self,
        mm_items,
        hf_processor_mm_kwargs,
        out_mm_kwargs,  # noqa: ANN001
    ) -> Sequence[PromptUpdate]:
        if "image" not in mm_items:
            return []
        token = self.info.get_hf_config().image_token_index
        images = mm_items.get_items("image", ImageProcessorItems)
        rates = self._rates(hf_processor_mm_kwargs, len(images))

        def placeholders(item: int) -> list[int]:
            return [token] * self._num_anchors(images, item, rates[item])

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]

    def _rates(self, kwargs: Mapping[str, object], images: int) -> list[float]:
        return effective_rates(kwargs, images, self.info.era)

    def _num_anchors(self, images: ImageProcessorItems, item: int, rate: float) -> int:
        return self.info.era.num_anchors(self._num_tokens(images, item), rate)

    def _num_tokens(self, images: ImageProcessorItems, item: int) -> int:
        size = images.get_image_size(item)
        return self.info.get_num_image_tokens(image_width=size.width, image_height=size.height)


def _refuse_names_alone(images: ImageProcessorItems) -> None:
    """Refuse a picture that is only named: its tokens must be counted before caches are asked."""
    if any(images.get(item) is None for item in range(len(images))):
        raise VLLMValidationError(
            "image uuid: got one without its picture, which a server that prunes cannot count; "
            "send the picture beside it",
            parameter="uuid",
        )
