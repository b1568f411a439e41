"""READ SECOND: where a slot's bias lives, how it is written, and how it is read back.

A store appends columns to query, key and value just before vLLM's own cache write. So the bias
sits in the KV cache beside the key that it belongs to and shares its fate: block table, prefix
cache, preemption and KV transfer carry it, and a slot that is written again holds the new value.

    KeyColumns    q~ = [q, c]   k~ = [k, log_bias / (c scale)]   v~ = [v, 0]     the paper's form
    ValueColumn   q~ = [q, 0]   k~ = [k, 0]   v~ = [m v, m] with m = exp(log_bias); the output's
                  last column is the new denominator: divide by it

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


@dataclass(frozen=True, slots=True)
class KeyColumns:
    """Bias in spare key columns; the query holds a constant there.

    The first column holds the bias rounded to the cache's dtype, the next the remainder, so that
    two columns of bf16 carry about 16 bits. Source: ERA README, "LAR" kernel form.
    """

    num_columns: int
    """1 is exact for float32; bf16 and fp8 need 2."""
    kv_dtype: torch.dtype
    """What the cache stores, which is what each column is rounded to."""

    limits: ClassVar[StoreLimits] = StoreLimits(
        kv_dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, _FP8}),
        sinks=True,
        soft_cap=False,
    )
    scaled: ClassVar[Literal["k", "v"]] = "k"

    @property
    def extra_columns(self) -> int:
        """Columns that the head must be widened by, at least."""
        return self.num_columns

    @property
    def query_constant(self) -> float:
        """What the query holds in the columns; 64 keeps fp8 (at most 448) in range."""
        return 64.0 if self.kv_dtype == _FP8 else 1.0

    def columns(
        self, bias: Float32[Tensor, "t"], width: int, scale: float, dtype: torch.dtype
    ) -> Float[Tensor, "t w"]:
        """Return one row a token: the rounded bias, its remainders, then zeros."""
        rest = bias / (scale * self.query_constant)
        parts = []
        for _ in range(self.num_columns):
            stored = rest.to(self.kv_dtype).float()
            parts.append(stored)
            rest = rest - stored
        return pad(torch.stack(parts, -1), (0, width - self.num_columns)).to(dtype)

    def before(
        self,
        query: Float[Tensor, "t hq dh"],
        key: Float[Tensor, "t hkv dh"],
        value: Float[Tensor, "t hkv dh"],
        columns: Float[Tensor, "t w"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value widened by w columns, just before vLLM's cache write."""
        width = columns.shape[-1]
        constant = pad(query, (0, self.num_columns), value=self.query_constant)
        return (
            pad(constant, (0, width - self.num_columns)),
            torch.cat([key, columns[:, None].expand(-1, key.shape[1], -1)], -1),
            pad(value, (0, width)),
        )

    def after(self, out: Float[Tensor, "t hq dw"], head_size: int) -> Float[Tensor, "t hq dh"]:
        """Drop the columns of the attention output: they are sums of zeros."""
        return out[..., :head_size]

    def cache_scale(self, calibrated: float) -> float:
        """Round up to a power of two: any other factor would undo the split into remainders."""
        return 2.0 ** math.ceil(math.log2(calibrated))

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
    same rounded m multiplies the values and fills the column.
    """

    num_columns: int
    """Always 1."""
    kv_dtype: torch.dtype
    """What the cache stores."""

    limits: ClassVar[StoreLimits] = StoreLimits(
        kv_dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, _FP8}),
        sinks=False,
        soft_cap=True,
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
        self, bias: Float32[Tensor, "t"], width: int, scale: float, dtype: torch.dtype
    ) -> Float[Tensor, "t w"]:
        """Return one row a token: the rounded mass (1 for text), then zeros."""
        del scale
        mass = bias.exp().to(self.kv_dtype).float()
        return pad(mass[:, None], (0, width - 1)).to(dtype)

    def before(
        self,
        query: Float[Tensor, "t hq dh"],
        key: Float[Tensor, "t hkv dh"],
        value: Float[Tensor, "t hkv dh"],
        columns: Float[Tensor, "t w"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query and key padded, and value times mass with the mass appended."""
        width = columns.shape[-1]
        mass = columns[:, None, :1]
        appended = columns[:, None].expand(-1, value.shape[1], -1)
        return pad(query, (0, width)), pad(key, (0, width)), torch.cat([value * mass, appended], -1)

    def after(self, out: Float[Tensor, "t hq dw"], head_size: int) -> Float[Tensor, "t hq dh"]:
        """Divide by the mass that was attended to; every mass is at least 1.

        The floor only keeps rows of padding finite.
        """
        total = out[..., head_size : head_size + 1].float().clamp_min(0.5)
        return (out[..., :head_size].float() / total).to(out.dtype)

    def cache_scale(self, calibrated: float) -> float:
        """Widen the value scale: values times mass reach further than values."""
        return calibrated * (8.0 if calibrated == 1.0 else 64.0)

    def read(
        self, rows: Float[Tensor, "m hkv dw"], head_size: int, scale: float
    ) -> Float32[Tensor, "m hkv"]:
        """Return the bias held by m slots, given the slots' value rows out of the cache."""
        del scale
        return rows[..., head_size].float().log()


STORES: Final = {"key_columns": KeyColumns, "value_column": ValueColumn}
"""Public name -> store."""


def make_store(name: str, num_columns: int | None, kv_dtype: torch.dtype) -> BiasStore:
    """Build a bias store for a cache of the given dtype.

    Raises:
        ConfigError: unknown store, or a cache dtype that it cannot hold a bias in.
    """
    if name not in STORES:
        raise ConfigError(unknown_name("bias store", name, STORES))
    allowed = STORES[name].limits.kv_dtypes
    if kv_dtype not in allowed:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in allowed))
        raise ConfigError(f"bias store {name!r}: got a KV cache of {kv_dtype}, allowed: {names}")
    enough = 1 if kv_dtype == torch.float32 or name == "value_column" else 2
    return STORES[name](num_columns or enough, kv_dtype)
