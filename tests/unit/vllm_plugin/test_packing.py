"""What rides behind an embedding comes back exactly, in every dtype."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from era_vllm.vllm_plugin.packing import pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(
    axes=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32 - 1),
    top=st.sampled_from([0, 255, 256, 65_535]),
)
def test_round_trip(dtype: torch.dtype, axes: int, seed: int, top: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 8, generator=generator).to(dtype)
    bias = 7 * torch.rand(5, generator=generator)
    offsets = torch.randint(0, top + 1, (5, axes), generator=generator)
    found = unpack(pack(rows, bias, offsets), axes)
    assert torch.equal(found.rows, rows)
    assert torch.equal(found.offsets, offsets)
    torch.testing.assert_close(found.log_bias, bias, rtol=0, atol=2e-6)
