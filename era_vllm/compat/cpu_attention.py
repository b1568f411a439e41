"""Which of vLLM's CPU kernels reads an fp8 KV cache, and which of them lose its smallest numbers.

Upstream (0.32.0): ``_get_attn_isa`` (v1/attention/backends/cpu_attn.py:520) names the kernel by
instruction set and dtype. The AMX one (csrc/cpu/cpu_attn_amx.hpp) reads e4m3 as bfloat16 with the
exponent left 120 too low (cpu_types_x86.hpp:230), which puts e4m3's least normal number, 2^-6, at
float32's, 2^-126; and TDPBF16PS takes every operand, and every sum on its way, below that for 0.
So what a key adds counts for nothing where probability x value is below 1/64 of the value scale.
Private use: refuse, before anything is loaded, a bias store whose columns come to lie there.
Remove when: the AMX kernel reads fp8 at its own exponent.
"""

from typing import TYPE_CHECKING, Final

from era_vllm.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

FLUSHING: Final = frozenset({"amx", "amx_fp8"})
"""Kernels that take small sums of an fp8 cache for 0; "amx_fp8" (not chosen by 0.32) is unseen."""


def fp8_kernel(dtype: "torch.dtype") -> str | None:
    """Return vLLM's name of the kernel for an fp8 cache and a model of this dtype; None on a GPU.

    Heads and blocks are multiples of 32 there: vLLM takes no others with fp8.

    Raises:
        UnsupportedError: a CPU for which vLLM has no kernel for fp8.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    if not current_platform.is_cpu():
        return None
    try:
        return _get_attn_isa(dtype, 32, 32, "fp8")
    except NotImplementedError as error:  # vLLM's word for a CPU without one
        raise UnsupportedError(
            f"--kv-cache-dtype fp8: vLLM has no kernel for it on this CPU ({error}); use auto"
        ) from error
