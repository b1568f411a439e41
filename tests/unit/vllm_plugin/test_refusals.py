"""The pair that one kind of CPU does not bear, by the name of vLLM's kernel; no such CPU needed."""

from types import SimpleNamespace

import pytest
import torch

from era_vllm.compat import cpu_attention
from era_vllm.errors import UnsupportedError
from era_vllm.vllm_plugin.refusals import REFUSALS

(ROW,) = (row for row in REFUSALS if "value_column" in row.feature)


def config(store: str, cache: str) -> SimpleNamespace:
    """As much of vLLM's config as the row reads."""
    hf_config = SimpleNamespace(era={"bias_store": store})
    return SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype=cache),
        model_config=SimpleNamespace(dtype=torch.bfloat16, hf_config=hf_config),
    )


@pytest.mark.parametrize("cache", ["auto", "bfloat16", "fp8", "fp8_e4m3"])
@pytest.mark.parametrize("store", ["key_columns", "value_column"])
@pytest.mark.parametrize(
    ("kernel", "flushes"),
    [
        ("amx", True),
        ("amx_fp8", True),
        ("vec", False),
        ("vec16", False),
        ("neon", False),
        ("rvv", False),
        ("vsx", False),
        ("vxe", False),
        (None, False),  # a GPU
    ],
)
def test_refused_where_the_kernel_flushes_what_the_store_needs(
    monkeypatch: pytest.MonkeyPatch, kernel: str | None, flushes: bool, store: str, cache: str
) -> None:
    monkeypatch.setattr(cpu_attention, "fp8_kernel", {torch.bfloat16: kernel}.__getitem__)
    refused = flushes and store == "value_column" and cache.startswith("fp8")
    assert ROW.wanted(config(store, cache)) is refused


def test_a_cache_that_is_not_fp8_asks_for_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM raises where it has none for fp8, which is nothing to an engine without."""
    monkeypatch.delattr(cpu_attention, "fp8_kernel")
    assert not ROW.wanted(config("value_column", "auto"))
    assert not ROW.wanted(config("key_columns", "fp8"))


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("amx", "avx512"), [(False, False), (False, True), (True, True)])
def test_a_cpu_without_a_kernel_for_fp8_is_refused_in_words_of_ours(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool
) -> None:
    """By what vLLM itself chooses; only what it asks of the CPU is set, so that each runs here."""
    pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    from vllm.platforms import CpuArchEnum, current_platform

    if not current_platform.is_cpu() or current_platform.get_cpu_architecture() != CpuArchEnum.X86:
        pytest.skip("the instruction sets are x86's, and of vLLM's CPU build")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    if not (amx or avx512):
        with pytest.raises(UnsupportedError, match="no kernel for it on this CPU .*; use auto"):
            cpu_attention.fp8_kernel(torch.bfloat16)
    else:
        flushes = cpu_attention.fp8_kernel(torch.bfloat16) in cpu_attention.FLUSHING
        assert flushes is amx
