"""Turns a vLLM model of a family into a pruned one: prunes after the encoder, hands over the bias.

embed_multimodal   tower + projector (vLLM's) -> prune -> embeddings with channels behind them
embed_input_ids    channels -> the step's biases and offsets; embeddings -> vLLM's own merge
forward            offsets + carried positions -> original positions (``positions.py``)
attention          reads the bias buffer (``attention/layer.py``)
"""

from collections import defaultdict
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sequence import IntermediateTensors

from era_vllm.attention.layer import swap
from era_vllm.contracts import ModelAdapter
from era_vllm.errors import UnsupportedError
from era_vllm.pipeline import prune
from era_vllm.policies import make_policy
from era_vllm.types import DEGENERATE_KINDS, PrunedTokens, Signal, VisualTokens
from era_vllm.vllm_plugin.channels import pack, unpack
from era_vllm.vllm_plugin.encoder_tap import EncoderTap
from era_vllm.vllm_plugin.metrics import ReducerMetrics
from era_vllm.vllm_plugin.positions import (
    AnchorOffsets,
    longer_rope_table,
    prompt_positions,
    table_rows,
)
from era_vllm.vllm_plugin.processor import NUM_ANCHORS, PIXEL_HASH
from era_vllm.vllm_plugin.resolve import era_config

OnPrune = Callable[[VisualTokens, PrunedTokens], None]


class PrunedModelMixin(nn.Module):
    """Mixed in before a family's vLLM class."""

    supports_mrope: ClassVar[Literal[True]] = True
    """Read by vLLM where positions are carried (``positions`` "original")."""
    adapter: ClassVar[ModelAdapter]
    listeners: list[OnPrune]
    """Each is called with what was pruned and what came out; for inspection and tests. They come
    and go as they like."""
    images_per_pass: int
    """Images that go through the tower at once: as many as vLLM profiled memory for."""
    degenerate: Tensor
    """[kinds] int64: repaired inputs so far, in the order of ``types.Degenerate``."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        era = era_config(model_config.hf_config)
        more = model_config.max_model_len if era.positions == "original" else 0
        with longer_rope_table(model_config.hf_config.get_text_config(), more):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.era = era
        self.policy = make_policy(self.era)
        if missing := self.policy.needs - self.adapter.provides - {Signal.PIXEL_HASH}:
            raise UnsupportedError(
                f"policy {self.era.policy!r} needs {', '.join(s.value for s in missing)}, which "
                f"{type(self).__name__} does not provide; choose dpp, pool, random or uniform"
            )
        self.grid = self.adapter.grid(self.config)
        rows, columns = self.grid
        budget = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self.images_per_pass = max(1, budget // (rows * columns))
        layer = self.adapter.tapped_layer(self, self.config, self.era.attention_layer)
        signals = self.policy.needs & self.adapter.provides
        self.tap = EncoderTap(layer, signals, self.era.attention_queries)
        self.bias_buffer = swap(self.adapter.language_model(self), vllm_config, self.era)
        text_config = model_config.hf_config.get_text_config()
        self.anchor_offsets = AnchorOffsets(
            self.bias_buffer.columns.shape[0], table_rows(text_config) + more
        )
        counts = torch.zeros(DEGENERATE_KINDS, dtype=torch.int64)
        self.register_buffer("degenerate", counts, persistent=False)
        self.reducer_metrics = ReducerMetrics()
        self.listeners = []

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """Return for each image [K, d + 5]: retained embeddings, their bias and index.

        The scheduler counts K tokens an image and may send more images than were profiled, so they
        pass the tower in parts of at most ``images_per_pass``.
        """
        counts, seeds = kwargs.pop(NUM_ANCHORS, None), kwargs.pop(PIXEL_HASH, None)
        done: list[Tensor] = []
        for inputs in self.adapter.split(kwargs, self.images_per_pass):
            with self.tap.reading():
                encoded = super().embed_multimodal(**inputs)
            embeds = encoded if isinstance(encoded, Tensor) else torch.stack(list(encoded))
            part = slice(len(done), len(done) + len(embeds))
            tokens = VisualTokens(
                embeds,
                self.grid,
                attention=self.tap.take(Signal.ENCODER_ATTENTION),
                scores=self.tap.take(Signal.ENCODER_SCORES),
                seeds=seeds.flatten()[part].to(embeds.device, non_blocking=True),
            )
            num_anchors = counts.flatten()[part].tolist()  # CPU tensor: no sync
            with self.reducer_metrics.timed(tokens.segments, self.degenerate):
                done += self._pruned(tokens, num_anchors)
        return done

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: list[Tensor] | tuple[Tensor, ...] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Write the step's biases and offsets; embed its tokens with vLLM's own merge."""
        if multimodal_embeddings is None or len(multimodal_embeddings) == 0:
            self.bias_buffer.clear()
            self.anchor_offsets.clear()
            return super().embed_input_ids(input_ids, is_multimodal=is_multimodal)
        images = [unpack(packed) for packed in multimodal_embeddings]
        self.bias_buffer.write(is_multimodal, torch.cat([image.log_bias for image in images]))
        self.anchor_offsets.write(is_multimodal, torch.cat([image.anchors for image in images]))
        embeds = [image.embeds for image in images]
        return super().embed_input_ids(input_ids, embeds, is_multimodal=is_multimodal)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Int[Tensor, "3 t"], int]:
        """Return a request's carried positions (called by vLLM once, where they are original)."""
        total = self.grid[0] * self.grid[1]
        images = [
            (place.offset, place.length, total)
            for place in sorted(
                (feature.mm_position for feature in mm_features), key=lambda place: place.offset
            )
        ]
        return prompt_positions(len(input_tokens), images)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        """Run the language model; carried positions [3, t] become its own [t]."""
        if positions.ndim == 2:
            positions = self.anchor_offsets.add_to(positions)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def _pruned(self, tokens: VisualTokens, num_anchors: list[int]) -> list[Tensor]:
        groups: dict[int, list[int]] = defaultdict(list)
        for image, count in enumerate(num_anchors):
            groups[count].append(image)
        packed: dict[int, Tensor] = {}
        for count, images in groups.items():
            group = tokens if len(groups) == 1 else _take(tokens, images)
            result = prune(group, count, self.policy, merge=self.era.merge, bias=self.era.bias)
            self.degenerate += result.degenerate
            for listen in tuple(self.listeners):
                listen(group, result)
            rows = pack(result.embeds, result.log_bias, result.anchors)
            packed.update(zip(images, rows, strict=True))
        return [packed[image] for image in range(len(num_anchors))]


def _take(tokens: VisualTokens, images: list[int]) -> VisualTokens:
    index = torch.tensor(images).to(tokens.embeds.device, non_blocking=True)

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.index_select(0, index)

    return VisualTokens(
        tokens.embeds.index_select(0, index),
        tokens.grid,
        pick(tokens.attention),
        pick(tokens.scores),
        pick(tokens.seeds),
    )
