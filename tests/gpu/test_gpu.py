"""What only a GPU can show: the same comparison with the same oracle, which stays on the CPU.

An engine a test, each in a process of its own with vLLM's defaults: Model Runner V2, async
scheduling, and CUDA graphs where a test does not ask for eager. The oracle is fed the engine's own
reduced embeddings, so that the tower's rounding is no difference.

    float32    Triton and Flex only; within 1e-4, with TF32 off
    bf16, fp8  pruned and text alone at most 1.5 times the error of stock vLLM's text, with the same
               arguments in another process (``engine/test_precision.py``)
"""

from importlib.util import find_spec

import pytest
import torch

from era_vllm.config import EraConfig
from era_vllm.lab.oracle import Segment
from era_vllm.lab.samples import load_samples
from era_vllm.pixels import pixel_hash
from tests.engine.conftest import (
    CONTROL_FACTOR,
    STOCK_FACTOR,
    TOLERANCE,
    compare_with,
    mean_errors,
)
from tests.engine.conftest import QUESTIONS as TEXTS
from tests.engine.test_doctor import (  # noqa: F401 - the doctor's live check, on this machine
    test_doctor_finds_all_well_and_its_control_fails,
)

PICTURES = [[text, picture] for picture, text in enumerate(TEXTS)]
ALONE = [[text, None] for text in TEXTS]
MIXED = [["what shape is red?", 0], ["is there a red circle?", None], ["how many shapes?", 1]]
# float32 is float32: by default Triton and cuBLAS round its products to TF32.
FLOAT32 = {"TRITON_F32_DEFAULT": "ieee", "NVIDIA_TF32_OVERRIDE": "0"}
V2 = "vllm.v1.worker.gpu.model_runner"

both_stores = pytest.mark.parametrize("store", ["key_columns", "value_column"])
small_memory = {"gpu_memory_utilization": 0.3}


def segments_of(oracle, saved):
    """Return what the engine put in the place of each picture: picture hash -> segment."""
    found = {}
    for attention, anchors, log_bias, seeds, embeds in saved["ranks"][0]:
        n = len(attention[0][0])
        columns = (torch.tensor(values) for values in (embeds, log_bias, anchors))
        for seed, *values in zip(seeds, *columns, strict=True):
            found[seed] = Segment(*values, n)
    return found


@pytest.fixture
def answered(oracle):
    """Return (ids, segments, log-probabilities) of every question."""
    images = [sample.image for sample in load_samples()]

    def rows(saved, questions, dtype):
        segments = segments_of(oracle, saved)
        for (_, picture), answer in zip(questions, saved["answers"], strict=True):
            own = []
            if picture is not None:
                own = [segments[pixel_hash(oracle.pixels(images[picture])[0].to(dtype))]]
            yield answer["ids"][:-1], own, answer["log_probs"]

    return rows


@pytest.fixture
def exact(answered, oracle, measured):
    """Assert that every answer of a float32 engine is the oracle's, and is not without the bias."""

    def check(saved, questions, config):
        for ids, segments, log_probs in answered(saved, questions, torch.float32):
            found = compare_with(oracle, ids, segments, log_probs, config)
            control = found.without_bias if segments else None
            measured(config, saved["kernel"], found.exact, control, TOLERANCE)
            assert found.exact < TOLERANCE
            assert control is None or control > CONTROL_FACTOR * TOLERANCE

    return check


@pytest.fixture
def close(apart, answered, oracle, measured):
    """Run an engine that is not float32; assert that it errs little more than stock vLLM's text."""

    def check(arguments, store, **variables):
        config, questions = EraConfig(bias_store=store), PICTURES + ALONE
        settings = {"bias_store": store}
        saved = apart(arguments, settings=settings, questions=questions, **variables)
        rows = list(answered(saved, questions, torch.bfloat16))
        pruned, without = mean_errors(oracle, rows[: len(PICTURES)], config)
        text, _ = mean_errors(oracle, rows[len(PICTURES) :], config)
        arguments = {**arguments, "attention_backend": saved["backend"]}
        stock = apart(arguments, settings=None, questions=ALONE, **variables)
        assert stock["backend"] == saved["backend"]
        error, _ = mean_errors(oracle, answered(stock, ALONE, torch.bfloat16), config)
        ours, allowed = max(pruned, text), STOCK_FACTOR * error
        measured(config, saved["kernel"], ours, without, allowed)
        assert ours <= allowed
        assert without > CONTROL_FACTOR * allowed
        return saved

    return check


@pytest.mark.situation("GPU: eager, float32")
@both_stores
@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLEX_ATTENTION"])
def test_float32(apart, exact, backend, store):
    config = EraConfig(bias_store=store)
    arguments = {"attention_backend": backend, **small_memory}
    saved = apart(arguments, settings={"bias_store": store}, questions=MIXED, **FLOAT32)
    assert saved["backend"] == backend
    exact(saved, MIXED, config)


@pytest.mark.situation("GPU: compact positions")
def test_compact_positions(apart, exact):
    arguments, settings = {"attention_backend": "TRITON_ATTN"}, {"positions": "compact"}
    saved = apart({**arguments, **small_memory}, settings=settings, questions=MIXED, **FLOAT32)
    exact(saved, MIXED, EraConfig(positions="compact"))


@pytest.mark.situation("GPU: chunked prefill, prefix hits")
@both_stores
def test_chunks_and_prefix_hits(apart, exact, store):
    questions = [[" ".join([text] * 8), picture] for text, picture in MIXED]
    arguments = {
        "attention_backend": "TRITON_ATTN",
        "max_num_batched_tokens": 16,
        "max_num_seqs": 4,
        "block_size": 16,
        **small_memory,
    }
    settings = {"bias_store": store}
    saved = apart(arguments, settings=settings, questions=questions, rounds=2, **FLOAT32)
    assert min(answer["cached"] for answer in saved["answers"]) >= 16
    exact(saved, questions, EraConfig(bias_store=store))


@pytest.mark.situation("GPU: padding rows of CUDA graphs")
@both_stores
def test_padding_rows_of_cuda_graphs(apart, exact, store):
    # three requests decode in a graph of four rows, after a step that filled more with biases
    arguments = {
        "attention_backend": "TRITON_ATTN",
        "enforce_eager": False,
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 64, 128]},
        "enable_prefix_caching": False,
        **small_memory,
    }
    settings = {"bias_store": store}
    saved = apart(arguments, settings=settings, questions=MIXED, rounds=2, **FLOAT32)
    assert saved["graphs"] != "NONE"
    assert 3 not in saved["graph_sizes"]
    exact(saved, MIXED, EraConfig(bias_store=store))


@pytest.mark.situation("GPU: preemption")
def test_preemption(apart, exact, record_property):
    arguments = {
        "attention_backend": "TRITON_ATTN",
        "num_gpu_blocks_override": 19,  # 18 of 16 for six requests that grow to 6 each
        "block_size": 16,
        "max_model_len": 128,
        "max_num_seqs": 6,
        **small_memory,
    }
    saved = apart(arguments, settings={}, questions=PICTURES, steps=40, **FLOAT32)
    assert saved["preempted"] > 0
    record_property("counted", f"preemptions: {saved['preempted']:.0f}")
    exact(saved, PICTURES, EraConfig())


@pytest.mark.situation("GPU: CUDA graphs and async scheduling, bf16")
@both_stores
@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION", None])
def test_bf16_with_the_defaults(close, backend, store, record_property):
    chosen = {} if backend is None else {"attention_backend": backend}
    arguments = {"dtype": "bfloat16", "enforce_eager": False, **chosen, **small_memory}
    saved = close(arguments, store)
    assert saved["runner"] == V2
    assert saved["async"]
    assert saved["graphs"] != "NONE"
    assert backend in (None, saved["backend"])
    record_property("counted", f"{saved['backend']}, head {saved['head_size']}, {saved['graphs']}")


@pytest.mark.situation("GPU: Model Runner V1, bf16")
@both_stores
def test_model_runner_v1(close, store):
    arguments = {"dtype": "bfloat16", "enforce_eager": False, **small_memory}
    saved = close(arguments, store, VLLM_USE_V2_MODEL_RUNNER="0")
    assert saved["runner"] != V2


@pytest.mark.situation("GPU: fp8 KV cache")
@both_stores
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
def test_fp8_cache(close, backend, eager, store):
    if backend == "FLASH_ATTN" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("FlashAttention reads an fp8 cache on Hopper and later")
    arguments = {
        "dtype": "bfloat16",
        "kv_cache_dtype": "fp8",
        "enforce_eager": eager,
        "attention_backend": backend,
        **small_memory,
    }
    close(arguments, store)


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="FlashInfer is not installed")
def test_flashinfer_takes_no_widened_head(apart):
    # 64, 128, 256 and 512 only (v1/attention/backends/flashinfer.py); vLLM itself refuses
    arguments = {"dtype": "bfloat16", "attention_backend": "FLASHINFER", **small_memory}
    with pytest.raises(AssertionError, match="head_size"):
        apart(arguments, settings={}, questions=MIXED)
