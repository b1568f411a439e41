"""What an extension implements: a pruning policy, a model adapter, a place for the bias.

Each contract is one file to implement (see .github/CONTRIBUTING.md). The property tests in
``tests/contracts`` are run on every implementation found in ``policies/`` and ``attention/``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from era_vllm.types import Clusters, Signal, VisualTokens


@runtime_checkable
class PruningPolicy(Protocol):
    """Chooses anchors, merges the rest into them, and says how much attention each stands for.

    A policy is a frozen dataclass called ``Policy`` in ``policies/<name>.py``; its fields are its
    options. It is batched over segments, deterministic, and its result for one segment does not
    depend on the others. It never sees K >= N (the pipeline returns such segments untouched), nor
    NaN or infinite values or negative attention (the pipeline repairs and counts them).
    """

    prompt_dependent: ClassVar[bool]
    """True would mean that results may not be shared across prompts: no such policy is served."""

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals that must be present in ``VisualTokens``."""
        ...

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """Return the anchors' indices, ascending, ``num_anchors`` a segment."""
        ...

    def merge(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Assign every token to an anchor and return the merged embeddings."""
        ...

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return the natural log of the mass that each anchor stands for, >= 0."""
        ...


@dataclass(frozen=True, slots=True)
class TappedLayer:
    """The encoder layer whose attention a policy reads."""

    attention: nn.Module
    """Called as ``attention(q, k, v)``, each [s, n, heads * dh]; has ``num_heads`` (of this rank),
    ``head_size`` and ``scale``."""
    heads: int
    """Vision heads over all ranks."""
    skipped_keys: int
    """Leading keys that are no visual token (CLS, registers)."""


@runtime_checkable
class ModelAdapter(Protocol):
    """Facts about a model family; ``vllm_plugin/model_mixin.py`` turns them into vLLM code."""

    architectures: ClassVar[tuple[str, ...]]
    """Hugging Face architecture names that it serves."""
    provides: ClassVar[frozenset[Signal]]
    """Signals that its encoder can give."""

    def grid(self, hf_config: object) -> tuple[int, int]:
        """Rows and columns of one segment's token grid, known before encoding."""
        ...

    def split(self, inputs: Mapping[str, object], segments: int) -> list[dict[str, object]]:
        """Cut the encoder's inputs into parts of at most so many segments, in order."""
        ...

    def language_model(self, model: nn.Module) -> nn.Module:
        """The module whose attention layers carry the bias."""
        ...

    def encoder_layer(self, hf_config: object, layer: int | None) -> int:
        """The encoder layer to read, from 1, given it as the model's feature layer is counted.

        None = that one. Refuses a layer that features do not come through; asked while the model
        is built, before its weights are read.
        """
        ...

    def tapped_layer(self, model: nn.Module, hf_config: object, layer: int | None) -> TappedLayer:
        """That layer of the built model."""
        ...


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Where a bias store is exact; outside of it the server refuses at start-up."""

    kv_dtypes: frozenset[torch.dtype]
    sinks: bool
    """Works with attention sinks."""
    soft_cap: bool
    """Works with a soft cap on attention scores."""
    flushed: bool
    """Works where sums over an fp8 cache are 0 below 1/64 of its scale (``cpu_attention``)."""


@runtime_checkable
class BiasStore(Protocol):
    """Where a slot's bias is kept in the KV cache, how it is written, and how it is read back.

    ``attention/layer.py`` calls ``before`` and ``after`` around vLLM's own ``Attention``, so the
    bias is written by vLLM's own cache write and lives exactly as long as the slot.

    A layer's KV head may weigh the bias by an exponent (``EraConfig.gamma``, gamma x log_bias): a
    store is then asked for the columns of each head's own bias.
    """

    limits: ClassVar[StoreLimits]
    scaled: ClassVar[Literal["k", "v"]]
    """Whose rows hold the bias: ``read`` is given these."""

    @property
    def extra_columns(self) -> int:
        """Columns that the head must be widened by, at least."""
        ...

    def columns(
        self, bias: Float32[Tensor, "*r"], width: int, scale: float, dtype: torch.dtype
    ) -> Float[Tensor, "*r w"]:
        """Return the columns that stand for each bias; the exponent is in the bias.

        Args:
            dtype: The model's, in which columns come to the cache: both must hold each exactly.
        """
        ...

    def before(
        self,
        query: Float[Tensor, "t hq dh"],
        key: Float[Tensor, "t hkv dh"],
        value: Float[Tensor, "t hkv dh"],
        columns: Float[Tensor, "t h w"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value widened by w columns, just before vLLM's cache write.

        Args:
            columns: Of the step's tokens; h is 1 (the same for all) or one a KV head.
        """
        ...

    def after(self, out: Float[Tensor, "t hq dw"], head_size: int) -> Float[Tensor, "t hq dh"]:
        """Return the attention output of the original head size."""
        ...

    def cache_scale(self, tensor: Literal["q", "k", "v"], calibrated: float) -> float:
        """Return the scale to use instead of a calibrated one (fp8 caches; 1 = not calibrated).

        It was measured on tensors without columns, and has to hold them with columns.
        """
        ...

    def read(
        self, rows: Float[Tensor, "m hkv dw"], head_size: int, scale: float
    ) -> Float32[Tensor, "m hkv"]:
        """Return the bias held by m slots, given their key (or value) rows out of the cache."""
        ...
