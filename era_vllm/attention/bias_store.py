"""READ SECOND: where a slot's bias lives, how it is written, and how it is read back.

A store appends columns to query, key and value just before vLLM's own cache write. So the bias
sits in the KV cache beside the key that it belongs to and shares its fate: block table, prefix
cache, preemption and KV transfer carry it, and a slot that is written again holds the new value.

    KeyColumns    q~ = [q, c]   k~ = [k, log_bias / (c scale)]   v~ = [v, 0]     the paper's form
    ValueColumn   q~ = [q, 0]   k~ = [k, 0]   v~ = [m v, m] with m = exp(log_bias); the output's
                  last column is the new denominator: divide by it

The columns are a KV head's own already. So an exponent per layer and KV head (``gamma``: bias
gamma x log_bias, mass m ** gamma) costs no cache: a store is given each head's own bias, and rounds
its column once.

Leaves out: which layers do this and with which head size (``layer.py``), one step's biases
(``bias_buffer.py``).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import pad

from era_vllm.contracts import BiasStore, StoreLimits
from era_vllm.errors import ConfigError, unknown_name

_FP8: Final = torch.float8_e4m3fn
_LARGEST_FP8: Final = 448.0
_LARGEST_FLOAT16: Final = 65280.0
_LARGEST_BFLOAT16: Final = torch.finfo(torch.bfloat16).max
_MASS_UNIT: Final = 4.0
"""Smallest scale of fp8 values times mass. Masses are rounded on its grid, which is also the grid
of every larger power of two up to ``_COARSEST``: the cache does not round them again."""
_COARSEST: Final = 64.0
"""Largest scale of fp8 values times mass: a mass of 1 is still a normal number (2^-6)."""
_LARGEST_MASS: Final = _LARGEST_FP8 * _MASS_UNIT
"""1792, held in fp8 and float16; an anchor stands for no more than its segment's tokens."""
_HEADROOM: Final = 500.0
"""A calibrated value scale covers values; this mass times the largest of them must fit too."""
_UNCALIBRATED: Final = 8.0
"""Value scale where none was calibrated: values of 7 with a mass of 500 fit (8 x 448), and values
down to 1/8 keep fp8's relative precision."""
_FP8_CONSTANT: Final = 8.0
"""What fp8 queries hold: for heads of 64 a column of an uncalibrated cache (scale 1) is then the
bias itself, whose remainder stays above 1/64, which some kernels take for 0 (``cpu_attention``)."""
_FINEST_KEY_SCALE: Final = 2.0**-4
"""Columns of up to 448/16 fit: for heads of 64 a bias of 28, for heads of 256 one of 14."""
_FINEST_QUERY_SCALE: Final = 2.0**-5
"""The query constant is divided by the query's scale and must stay below 448."""


@dataclass(frozen=True, slots=True)
class KeyColumns:
    """Bias in spare key columns; the query holds a constant there.

    The first column holds the rounded bias, the next the remainder, so that two columns of bf16
    carry about 16 bits. Source: ERA README, "LAR" kernel form.
    """

    num_columns: int
    """1 is exact where model and cache are float32; else 2 are needed."""
    kv_dtype: torch.dtype
    """What the cache stores. A column is rounded to what both it and the model's dtype hold."""

    limits: ClassVar[StoreLimits] = StoreLimits(
        kv_dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, _FP8}),
        sinks=True,
        soft_cap=False,
        flushed=True,
    )
    scaled: ClassVar[Literal["k", "v"]] = "k"

    @property
    def extra_columns(self) -> int:
        """Columns that the head must be widened by, at least."""
        return self.num_columns

    @property
    def query_constant(self) -> float:
        """What the query holds in the columns."""
        return _FP8_CONSTANT if self.kv_dtype == _FP8 else 1.0

    def columns(
        self, bias: Float32[Tensor, "*r"], width: int, scale: float, dtype: torch.dtype
    ) -> Float[Tensor, "*r w"]:
        """Return for each bias: its rounded value, the remainders, then zeros."""
        rest = bias / (scale * self.query_constant)
        parts = []
        for _ in range(self.num_columns):
            stored = _rounded(rest, self.kv_dtype, dtype)
            parts.append(stored)
            rest = rest - stored
        return pad(torch.stack(parts, -1), (0, width - self.num_columns)).to(dtype)

    def before(
        self,
        query: Float[Tensor, "t hq dh"],
        key: Float[Tensor, "t hkv dh"],
        value: Float[Tensor, "t hkv dh"],
        columns: Float[Tensor, "t h w"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value widened by w columns, just before vLLM's cache write.

        The query holds its constant in all w columns: in those beyond ours the key holds 0.
        """
        width = columns.shape[-1]
        return (
            pad(query, (0, width), value=self.query_constant),
            torch.cat([key, columns.expand(-1, key.shape[1], -1)], -1),
            pad(value, (0, width)),
        )

    def after(self, out: Float[Tensor, "t hq dw"], head_size: int) -> Float[Tensor, "t hq dh"]:
        """Drop the columns of the attention output: they are sums of zeros."""
        return out[..., :head_size]

    def cache_scale(self, tensor: Literal["q", "k", "v"], calibrated: float) -> float:
        """Round up to a power of two: any other factor would undo the split into remainders."""
        if tensor == "v":
            return calibrated
        finest = _FINEST_QUERY_SCALE if tensor == "q" else _FINEST_KEY_SCALE
        return max(finest, _power_of_two(calibrated))

    def read(
        self, rows: Float[Tensor, "m hkv dw"], head_size: int, scale: float
    ) -> Float32[Tensor, "m hkv"]:
        """Return the bias held by m slots, given the slots' key rows out of the cache."""
        columns = rows[..., head_size : head_size + self.num_columns].float()
        return columns.sum(-1) * scale * self.query_constant


@dataclass(frozen=True, slots=True)
class ValueColumn:
    """Mass in one spare value column: for layers whose keys have no room, and soft-capped scores.

    The kernel returns sum(p m v) and sum(p m), whose ratio is rectified attention exactly. The
    same rounded m multiplies the values and fills the column. Within 1e-4 only where model and
    cache are float32: further columns would not help the others, since the kernel rounds its last
    output column, the denominator, to the model's dtype.
    """

    num_columns: int
    """Always 1."""
    kv_dtype: torch.dtype
    """What the cache stores."""

    limits: ClassVar[StoreLimits] = StoreLimits(
        kv_dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, _FP8}),
        sinks=False,
        soft_cap=True,
        flushed=False,  # a mass of 1 is stored as 1/16 so that one of 500 fits
    )
    scaled: ClassVar[Literal["k", "v"]] = "v"

    def __post_init__(self) -> None:
        if self.num_columns != 1:
            raise ConfigError(f"bias_columns: got {self.num_columns}, allowed for value_column: 1")

    @property
    def extra_columns(self) -> int:
        """Columns that the head must be widened by, at least."""
        return 1

    def columns(
        self, bias: Float32[Tensor, "*r"], width: int, scale: float, dtype: torch.dtype
    ) -> Float[Tensor, "*r w"]:
        """Return for each bias: the rounded mass (1 for text), then zeros."""
        del scale
        mass = bias.exp()
        if {self.kv_dtype, dtype} & {_FP8, torch.float16}:
            mass = mass.clamp_max(_LARGEST_MASS)
        unit = _MASS_UNIT if self.kv_dtype == _FP8 else 1.0
        mass = _rounded(mass / unit, self.kv_dtype, dtype) * unit
        return pad(mass[..., None], (0, width - 1)).to(dtype)

    def before(
        self,
        query: Float[Tensor, "t hq dh"],
        key: Float[Tensor, "t hkv dh"],
        value: Float[Tensor, "t hkv dh"],
        columns: Float[Tensor, "t h w"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query and key padded, and value times mass with the mass appended."""
        width = columns.shape[-1]
        mass = columns[..., :1]
        appended = columns.expand(-1, value.shape[1], -1)
        return pad(query, (0, width)), pad(key, (0, width)), torch.cat([value * mass, appended], -1)

    def after(self, out: Float[Tensor, "t hq dw"], head_size: int) -> Float[Tensor, "t hq dh"]:
        """Divide by the mass that was attended to; every mass is at least 1.

        The floor only keeps rows of padding finite.
        """
        total = out[..., head_size : head_size + 1].float().clamp_min(0.5)
        return (out[..., :head_size].float() / total).to(out.dtype)

    def cache_scale(self, tensor: Literal["q", "k", "v"], calibrated: float) -> float:
        """Widen the value scale, since values times mass reach further than values.

        To a power of two, or the mass would be rounded a second time when it is stored. 1 is
        vLLM's value for "not calibrated".
        """
        if tensor != "v":
            return calibrated
        if calibrated == 1.0:
            return _UNCALIBRATED
        return min(_COARSEST, max(_MASS_UNIT, _power_of_two(_HEADROOM * calibrated)))

    def read(
        self, rows: Float[Tensor, "m hkv dw"], head_size: int, scale: float
    ) -> Float32[Tensor, "m hkv"]:
        """Return the bias held by m slots, given the slots' value rows out of the cache."""
        del scale
        return rows[..., head_size].float().log()


def _rounded(
    x: Float32[Tensor, "*r"], kv_dtype: torch.dtype, dtype: torch.dtype
) -> Float32[Tensor, "*r"]:
    """Round to a number that the cache's format and the model's both hold: neither cast changes it.

    To the format of fewer bits first: the other then changes only the smallest numbers of float16
    (bfloat16 goes lower), by taking bits away. Saturates where torch's own casts may give NaN or
    infinity.
    """
    largest = min(_largest(kv_dtype), _largest(dtype))
    coarser, finer = sorted((kv_dtype, dtype), key=lambda one: torch.finfo(one).eps, reverse=True)
    return x.clamp(-largest, largest).to(coarser).to(finer).float()


def _largest(dtype: torch.dtype) -> float:
    """Return the largest of a format's numbers that bfloat16 holds too."""
    return {_FP8: _LARGEST_FP8, torch.float16: _LARGEST_FLOAT16}.get(dtype, _LARGEST_BFLOAT16)


def _power_of_two(x: float) -> float:
    return 2.0 ** math.ceil(math.log2(x))


STORES: Final = {"key_columns": KeyColumns, "value_column": ValueColumn}
"""Public name -> store."""


def make_store(
    name: str, num_columns: int | None, kv_dtype: torch.dtype, dtype: torch.dtype
) -> BiasStore:
    """Build a bias store for a cache of the given dtype and a model of another.

    Args:
        num_columns: ``EraConfig.bias_columns``; None = as many as hold the bias.
        kv_dtype: What the cache stores.
        dtype: The model's, in which columns come to the cache.

    Raises:
        ConfigError: unknown store, or a cache dtype that it cannot hold a bias in.
    """
    if name not in STORES:
        raise ConfigError(unknown_name("bias store", name, STORES))
    allowed = STORES[name].limits.kv_dtypes
    if kv_dtype not in allowed:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in allowed))
        raise ConfigError(f"bias store {name!r}: got a KV cache of {kv_dtype}, allowed: {names}")
    exact = kv_dtype == dtype == torch.float32
    enough = 1 if exact or name == "value_column" else 2
    return STORES[name](num_columns or enough, kv_dtype)
