"""Turns a vLLM model of a family into a pruned one: where vLLM's calls meet ours.

embed_multimodal   ``encoder_pass`` -> tower + projector (vLLM's) -> ``signals`` -> ``reducer``
embed_input_ids    ``step_state``; vLLM's own merge
forward            carried positions + offsets -> original positions (``positions``)
attention          reads the bias buffer (``attention/layer.py``)
"""

from typing import ClassVar, Literal

from jaxtyping import Int
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sequence import IntermediateTensors

from era_vllm.attention.layer import swap
from era_vllm.config import EraConfig
from era_vllm.contracts import ModelAdapter, query_layer
from era_vllm.errors import UnsupportedError
from era_vllm.policies import make_policy
from era_vllm.types import OF_EVERY_MODEL, Signal
from era_vllm.vllm_plugin.encoder_pass import encoded, passes
from era_vllm.vllm_plugin.families import family_of
from era_vllm.vllm_plugin.fields import modality_of, shape_of, unpack_items
from era_vllm.vllm_plugin.injection import InjectedStates, inject, with_states
from era_vllm.vllm_plugin.layouts import Layouts
from era_vllm.vllm_plugin.positions import (
    built_rows,
    longer_rope_table,
    prompt_positions,
    table_rows,
)
from era_vllm.vllm_plugin.reducer import Reducer
from era_vllm.vllm_plugin.resolve import era_config
from era_vllm.vllm_plugin.signals import SignalSource
from era_vllm.vllm_plugin.signals.encoder_probe import EncoderProbe
from era_vllm.vllm_plugin.signals.language_queries import LanguageQueries
from era_vllm.vllm_plugin.signals.pixel_hash import PixelHash
from era_vllm.vllm_plugin.signals.question import FirstLayerForm, QuestionRelevance
from era_vllm.vllm_plugin.signals.scout import Scout
from era_vllm.vllm_plugin.step_state import StepState


class PrunedModelMixin(nn.Module):
    """Mixed in before a family's vLLM class (``models.py``)."""

    supports_mrope: ClassVar[Literal[True]] = True
    """Read by vLLM where positions are carried (``positions`` "original")."""
    adapter: ClassVar[ModelAdapter]
    parts: ClassVar[tuple[type, dict[str, type]]]
    """vLLM's own model class, and what it registers with it."""
    tokens_per_pass: int
    """Tokens that the tower makes at once: as many as vLLM profiled memory for, or one item's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        hf_config = model_config.hf_config
        era = era_config(hf_config)
        self.adapter.check(hf_config)
        more = self._more_rows(model_config)
        with longer_rope_table(hf_config.get_text_config(), more):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.era, self.family = era, family_of(hf_config)
        self.layouts = Layouts(self.adapter, hf_config, era)
        self.policy = make_policy(self.era)
        self.tokens_per_pass = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self.sources = self._sources()
        width = self.adapter.width(hf_config)
        if era.scout_injection:  # the states ride behind the token
            width = hf_config.get_text_config().hidden_size
        self.reducer = Reducer(self.policy, self.era, width)
        self.bias_buffer = swap(self.adapter.language_model(self), vllm_config, self.era)
        table = built_rows(self.adapter.language_model(self))
        _refuse_extrapolation(era, table, model_config)
        injected = self._injected(width) if era.scout_injection else None
        self.step_state = StepState(self.bias_buffer, self.family.axes, table, injected)
        self._rehearsed = model_config.multimodal_config.skip_mm_profiling

    def embed_multimodal(self, **inputs: object) -> list[Tensor]:
        """Return for each item [kept, d + c]: what stays of it, in its unpruned order, packed.

        The first call, with which vLLM profiles memory, also runs the reducer at its largest (not
        where profiling is switched off, so that no user waits for it).
        """
        modality = modality_of(inputs, self.family.modalities)
        items = unpack_items(inputs, self.layouts, modality)
        done: list[Tensor] = []
        for of_pass, share in passes(self.adapter, items, inputs, self.tokens_per_pass):
            for source in self.sources:
                source.before(of_pass)
            # a video among others of unequal lengths comes as [1, length, d]
            # (vllm/model_executor/models/llava_onevision.py:825, 0.32.0)
            rows = [own.flatten(0, -2) for own in super().embed_multimodal(**share)]
            signals = {
                signal: values
                for source in self.sources
                for signal, values in source.after(of_pass, rows).items()
            }
            if (states := signals.pop(Signal.SCOUT_LAYERS, None)) is not None:
                rows = with_states(of_pass, rows, states)
            behind = encoded(of_pass, rows, signals)
            if not self._rehearsed:
                self.reducer.rehearse(behind)
                self._rehearsed = True
            done += self.reducer(behind)
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
            self.step_state.clear()
            return super().embed_input_ids(input_ids, is_multimodal=is_multimodal)
        rows = self.step_state.write(multimodal_embeddings, is_multimodal)
        return super().embed_input_ids(input_ids, rows, is_multimodal=is_multimodal)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Int[Tensor, "3 t"], int]:
        """Return a request's carried positions (called by vLLM once, where they are original)."""
        runs: list[tuple[int, int, int]] = []
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            shape = shape_of(feature.data, feature.modality)
            layout = self.layouts(feature.modality, shape)
            found = feature.mm_position.extract_embeds_range()
            runs += [
                (first, last - first + 1, span)
                for (first, last), span in zip(found, layout.spans, strict=True)
            ]
        return prompt_positions(len(input_tokens), runs)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        """Run the language model; carried positions [3, t] become its own."""
        if positions.ndim == 2:
            positions = self.step_state.anchor_offsets.add_to(positions)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def _more_rows(self, model_config: ModelConfig) -> int:
        """Return what a rotary table lacks for the longest prompt and answer."""
        if era_config(model_config.hf_config).positions != "original":
            return 0
        rows = table_rows(model_config.hf_config.get_text_config())
        return max(0, model_config.max_model_len - (self.adapter.table_factor - 1) * rows)

    def _injected(self, width: int) -> InjectedStates:
        """Return what the step's states are written to, once the scout's layers take it."""
        rows, dtype = self.bias_buffer.columns.shape[0], self.bias_buffer.columns.dtype
        states = InjectedStates(rows, self.era.scout, width, dtype)
        inject(self.adapter.language_model(self).model.layers[: self.era.scout], states)
        return states

    def _sources(self) -> list[SignalSource]:
        """Return the sources of what the policy needs, and of the hash that an inspector needs."""
        if missing := self.policy.needs - self.adapter.provides - OF_EVERY_MODEL:
            raise UnsupportedError(
                f"policy {self.era.policy!r} needs {', '.join(s.value for s in missing)}, which "
                f"{type(self).__name__} does not provide; choose divprune, dpp, pool, random or "
                "uniform"
            )
        sources: list[SignalSource] = [PixelHash()]
        asks = self.era.question_reduction if Signal.RELEVANCE in self.policy.needs else None
        if (queries_of := query_layer(self.policy)) == 1:
            width = self.adapter.width(self.config)
            sources.append(LanguageQueries(self.adapter.language_model(self), width))
        if self.era.scout or queries_of > 1:
            sources.append(
                Scout(
                    self.adapter.language_model(self),
                    self.era.scout_prefix or (),
                    layers=self.era.scout,
                    query_layer=queries_of if queries_of > 1 else 0,
                    width=self.adapter.width(self.config),
                    most=self.tokens_per_pass,
                    every_layer=self.era.scout_injection,
                    asks=asks if self.era.scout else None,
                    suffix=self.era.scout_suffix or (),
                )
            )
        if asks and not self.era.scout:
            width = self.adapter.width(self.config)
            form = FirstLayerForm(self.adapter.language_model(self))
            sources.append(QuestionRelevance(form, asks, width))
        layer = self.adapter.tapped_layer(self, self.config, self.era.attention_layer)
        if layer is not None and (wanted := self.policy.needs & self.adapter.provides):
            queries = self.era.attention_queries
            if queries == "cls" and not layer.skipped_keys:
                raise UnsupportedError(
                    f"attention_queries: got 'cls', but the tower of {type(self).__name__} has no "
                    "CLS token; allowed: 'all' (leave --era-attention-queries out)"
                )
            sources.append(EncoderProbe(layer, wanted, queries, self.adapter, self.config))
        return sources


def _refuse_extrapolation(era: EraConfig, table: int, model_config: ModelConfig) -> None:
    """Refuse answers past the trained positions where the rotary table ends there (yarn)."""
    needed = table_rows(model_config.hf_config.get_text_config()) + model_config.max_model_len
    if era.allow_extrapolation and era.positions == "original" and table < needed:
        raise UnsupportedError(
            f"allow_extrapolation: got true with a rotary table of {table} positions that cannot "
            f"be made longer, needed {needed}; allowed: false (leave --era-allow-extrapolation out)"
        )
