"""What an extension implements: a pruning policy, a model adapter, a place for the bias.

Each contract is one file to implement (see .github/CONTRIBUTING.md). The property tests in
``tests/contracts`` are run on every implementation found in ``policies/``, ``models/`` and
``attention/``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from era_vllm.layout import Layout
from era_vllm.types import Clusters, Signal, VisualTokens


@runtime_checkable
class PruningPolicy(Protocol):
    """Chooses anchors, merges the rest into them, and says how much attention each stands for.

    A policy is a frozen dataclass called ``Policy`` in ``policies/<name>.py``; its fields are its
    options. It is batched over segments, deterministic, and its result for one segment does not
    depend on the others. It never sees K >= N (the pipeline returns such segments untouched), nor
    NaN or infinite values or negative attention (the pipeline repairs and counts them).

    What is asked of a picture it may know by ``Signal.RELEVANCE`` alone, and is then served only
    where the question is part of a picture's identity (``EraConfig.question_aware``). Of a segment
    of which nothing is asked it chooses as if it did not read that signal.
    """

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals that must be present in ``VisualTokens``."""
        ...

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """Return the anchors' indices, ascending, ``num_anchors`` a segment."""
        ...

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Assign every token to an anchor or drop it; the pipeline averages the clusters."""
        ...

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return the natural log of the mass that each anchor stands for, >= 0."""
        ...


@runtime_checkable
class ReadsLayer(Protocol):
    """A policy whose ``Signal.LANGUAGE_QUERIES`` are those of a layer that it names."""

    @property
    def query_layer(self) -> int:
        """Layer of the language model, from 1."""
        ...


def query_layer(policy: PruningPolicy) -> int:
    """Return the layer of the language model whose queries a policy needs, from 1; 0 = none."""
    if Signal.LANGUAGE_QUERIES not in policy.needs:
        return 0
    return policy.query_layer if isinstance(policy, ReadsLayer) else 1


@dataclass(frozen=True, slots=True)
class TappedLayer:
    """The encoder layer whose attention a policy reads."""

    attention: nn.Module
    """Called with query and key, by place or by name, each [u, m, heads * dh] or [u, m, heads, dh];
    has ``num_heads`` (of this rank), ``head_size`` and ``scale``."""
    heads: int
    """Vision heads over all ranks."""
    skipped_keys: int
    """Leading keys that are no visual token (CLS, registers)."""
    keys: Callable[[Layout], int] | None = None
    """Keys m of each of an item's units where the units of all items, of any size, stand in one
    sequence (u = 1) and each attends to itself alone; None = u units of one size."""


@runtime_checkable
class ModelAdapter(Protocol):
    """Facts about a model family; ``vllm_plugin`` turns them into vLLM code.

    A subclass says what differs from a tower of one grid whose rows are the item's tokens. What is
    decided before anything is imported (modalities, axes of a position) is in the family's row
    (``vllm_plugin/families.py``).
    """

    provides: ClassVar[frozenset[Signal]] = frozenset()
    """Signals that its encoder can give."""
    table_factor: ClassVar[int] = 1
    """Times that vLLM makes the rotary table longer than the positions, of its own accord."""

    def check(self, hf_config: object) -> None:
        """Refuse a config whose tokens this adapter does not understand, before it is built.

        Also every field that vLLM's own class ignores, where it is not what vLLM does.

        Raises:
            UnsupportedError: names what it got and what is allowed.
        """
        ...

    def item_shape(
        self,
        info: object,
        modality: str,
        items: object,
        index: int,
        kwargs: Mapping[str, object],
    ) -> tuple[int, ...]:
        """Return the integers that an item's layout follows from, before it is processed.

        Args:
            info: vLLM's ``ProcessingInfo`` of the family.
            items: vLLM's ``ModalityDataItems``.
            index: Of the item among them.
            kwargs: Arguments of the Hugging Face processor.

        Returns:
            By default the picture's height and width.
        """
        size = cast("_Pictures", items).get_image_size(index)
        return (size.height, size.width)

    def max_shape(
        self, info: object, modality: str, seq_len: int, mm_counts: Mapping[str, int]
    ) -> tuple[int, ...]:
        """Return the shape with the most tokens: what the encoder's cache is budgeted for."""
        size = cast("_Sizes", info).get_image_size_with_most_features()
        return (size.height, size.width)

    def busiest_shape(
        self, info: object, modality: str, seq_len: int, mm_counts: Mapping[str, int]
    ) -> tuple[int, ...]:
        """Return the shape with the most work, which is that of vLLM's dummy.

        Where what the tower makes is resized it may have fewer tokens than another.
        """
        return self.max_shape(info, modality, seq_len, mm_counts)

    def mark(self, info: object, modality: str) -> Sequence[int]:
        """Return the tokens that stand for an item in a prompt, before placeholders take its place.

        By default the modality's own token.
        """
        return [getattr(cast("_Info", info).get_hf_config(), f"{modality}_token_id")]

    def layout(self, hf_config: object, modality: str, shape: tuple[int, ...]) -> Layout:
        """Return where an item's tokens stand unpruned, and what is pruned together.

        Pure and cached. ``layout.length`` is the number of rows that vLLM's own
        ``embed_multimodal`` gives for the item, and of placeholders that its processor writes.
        """
        ...

    def input_rows(self, layout: Layout) -> Mapping[str, int]:
        """Rows that an item has in each encoder input that is concatenated over items.

        All other inputs have one row an item. So a pass can be cut at items.
        """
        return {}

    def norm(self, processor: object) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and deviation that its processor takes from and divides pixels by."""
        own = cast("_Processor", processor).image_processor
        return own.image_mean, own.image_std

    def units(self, hf_config: object, pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return an item's pixels as pictures [u, 3, h, w], a unit (tile, frame) each.

        Args:
            pixels: As the tower is given them.
            shape: The item's.
        """
        return pixels.reshape(-1, *pixels.shape[-3:])

    def unpadded_rows(self, layout: Layout) -> Mapping[str, int]:
        """Rows that are the item's own in each input that is padded to its neighbours' number.

        So that pixels, their hash and the tower's work are the same whatever else a request holds.
        """
        return {}

    def made_shapes(
        self, hf_config: object, modality: str, processed: Mapping[str, Any]
    ) -> Sequence[tuple[int, ...]] | None:
        """Return the shapes that a processor's output tells of its items; None where it does not.

        They have to be ``item_shape``'s: otherwise the request is refused.
        """
        return None

    def signals(
        self,
        hf_config: object,
        tapped: Float32[Tensor, "u c m"] | Sequence[Float32[Tensor, "c m"]],
        layouts: Sequence[Layout],
    ) -> Sequence[Float32[Tensor, "c length"]]:
        """Bring what was read in the tower to the items' places; separators get 0.

        By what the family does linearly to the features: cut, resize, pool, shuffle pixels.

        Args:
            tapped: Of the pass's units (tiles, frames), in order, without ``skipped_keys``; a list
                where the tapped layer has ``keys``.
            layouts: Of the pass's items.

        Returns:
            One an item; by default a unit's own.
        """
        return list(tapped)

    def width(self, hf_config: object) -> int | None:
        """Columns of an encoder's row that are the token; the rest are riders. None = all."""
        return None

    def language_model(self, model: nn.Module) -> nn.Module:
        """Return the module whose attention layers carry the bias."""
        return cast(nn.Module, model.language_model)

    def encoder_layer(self, hf_config: object, layer: int | None) -> int:
        """Return the encoder layer to read, from 1, given it as the features' layer is counted.

        None = that one. Refuses a layer that features do not come through; asked while the model
        is built, before its weights are read.
        """
        ...

    def tapped_layer(
        self, model: nn.Module, hf_config: object, layer: int | None
    ) -> TappedLayer | None:
        """Return that layer of the built model; None = a model without a tower."""
        ...


@runtime_checkable
class _Size(Protocol):
    height: int
    width: int


@runtime_checkable
class _Pictures(Protocol):
    def get_image_size(self, item_idx: int) -> _Size: ...


class _Normed(Protocol):
    image_mean: Sequence[float]
    image_std: Sequence[float]


class _Processor(Protocol):
    image_processor: _Normed


class _Info(Protocol):
    def get_hf_config(self) -> object: ...


@runtime_checkable
class _Sizes(Protocol):
    def get_image_size_with_most_features(self) -> _Size: ...


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
