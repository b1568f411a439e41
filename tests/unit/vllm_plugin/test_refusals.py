"""Refusals that need a machine or model that is not here: by what vLLM's config says of them."""

from types import SimpleNamespace

import pytest
import torch

from era_vllm.compat import cpu_attention
from era_vllm.config import EraConfig
from era_vllm.errors import UnsupportedError
from era_vllm.vllm_plugin.families import FAMILIES
from era_vllm.vllm_plugin.refusals import REFUSALS, Refusal


def row_about(word: str) -> Refusal:
    (found,) = (row for row in REFUSALS if word in row.feature)
    return found


ROW = row_about("value_column")


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


@pytest.mark.parametrize("mode", ["weights", "data"])
@pytest.mark.parametrize(
    ("policy", "reads"),
    [
        *(("era", True), ("dpp", False), ("pool", False), ("random", False), ("uniform", False)),
        *(("visionzip", True), ("mfpruner", True), ("entropyprune", False)),
    ],
)
def test_images_are_shared_out_only_where_no_attention_is_read(
    mode: str, policy: str, reads: bool
) -> None:
    era = EraConfig(policy=policy).as_dict()
    of_images = SimpleNamespace(mm_encoder_tp_mode=mode)
    model = SimpleNamespace(hf_config=SimpleNamespace(era=era), multimodal_config=of_images)
    refused = row_about("--mm-encoder-tp-mode").wanted(SimpleNamespace(model_config=model))
    assert refused is (reads and mode == "data")


@pytest.mark.parametrize("rate", [None, 0.0, 0.5])
def test_vllms_own_pruning_is_refused_where_it_is_on(rate: float | None) -> None:
    of_images = SimpleNamespace(video_pruning_rate=rate)
    model = SimpleNamespace(multimodal_config=of_images)
    refused = row_about("--video-pruning-rate").wanted(SimpleNamespace(model_config=model))
    assert refused is bool(rate)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("free", [False, True])
def test_every_layer_must_attend(hybrid: bool, free: bool) -> None:
    model = SimpleNamespace(is_hybrid=hybrid, is_attention_free=free)
    refused = row_about("hybrid").wanted(SimpleNamespace(model_config=model))
    assert refused is (hybrid or free)


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_frames_with_text_between_them_cannot_be_joined() -> None:
    pytest.importorskip("vllm")
    from era_vllm.vllm_plugin.resolve import refuse_joined_frames

    for name, family in FAMILIES.items():
        hf_config = SimpleNamespace(architectures=[f"Era{name}"])
        refuse_joined_frames(hf_config, EraConfig())
        if family.frame_runs:
            with pytest.raises(UnsupportedError, match="frames_per_segment: got 2, .* allowed: 1"):
                refuse_joined_frames(hf_config, EraConfig(frames_per_segment=2))
        else:
            refuse_joined_frames(hf_config, EraConfig(frames_per_segment=2))
