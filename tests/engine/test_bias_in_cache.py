"""The bias lives with the KV entry: read back from the engine's own cache, in every layer."""

from types import SimpleNamespace

import pytest
import torch

from era_vllm.attention.cache_reader import read_bias, read_rows
from era_vllm.attention.layer import RectifiedAttention
from era_vllm.compat.attention_impl import differences
from era_vllm.errors import CacheError
from era_vllm.types import Degenerate

PREFIX = 3  # <s> USER :


def slots_of_first_request(engine, tokens):
    """Slots of the request that held row 0 of the batch last."""
    size = engine.block_size
    table = engine.runner.input_batch.block_table[0].get_cpu_tensor()[0]
    position = torch.arange(tokens)
    return table[position // size].long() * size + position % size


@pytest.mark.parametrize("shape", [(2, 4, 8, 16), (2, 8, 16)])
def test_a_cache_of_another_backend_is_not_read(shape):
    """A GPU's has the CPU's shape in another order, and would be written to by a CPU's slots."""
    layer = SimpleNamespace(kv_cache=torch.empty(shape, device="meta"), num_kv_heads=4)
    with pytest.raises(CacheError, match="on meta: reading slots back is only known for"):
        read_rows(layer, torch.arange(2), 8)


def test_backends_that_write_no_soft_cap_differently_are_alike():
    """FlashInfer keeps None; FlashAttention and Triton 0."""

    class Backend:
        def __init__(self, head_size, scale, logits_soft_cap):
            self.head_size, self.scale, self.logits_soft_cap = head_size, scale, logits_soft_cap

    def layer(*given):
        return SimpleNamespace(impl=Backend(*given))

    assert differences(layer(64, 0.125, None), layer(72, 0.125, 0)) == []
    assert differences(layer(64, 0.125, None), layer(72, 0.125, 30.0)) == ["logits_soft_cap"]
    assert differences(layer(64, 0.125, 30.0), layer(72, 0.1, 30.0)) == ["scale"]


def rectified_layers(engine):
    return [m for m in engine.model.modules() if isinstance(m, RectifiedAttention)]


@pytest.mark.parametrize(
    ("store", "dtype", "cache", "error"),
    [
        ("key_columns", "float32", "auto", 1e-6),
        ("key_columns", "bfloat16", "auto", 1e-4),
        ("key_columns", "bfloat16", "fp8", 1e-2),
        ("value_column", "float32", "auto", 1e-6),
        ("value_column", "bfloat16", "auto", 4e-3),
        ("value_column", "bfloat16", "fp8", 7e-2),
    ],
)
def test_anchors_hold_their_bias_and_text_holds_0(
    engine, setup, ask, images, oracle, needs_fp8, store, dtype, cache, error
):
    if cache == "fp8":
        needs_fp8(store)
    live = engine(setup(bias_store=store, llm={"dtype": dtype, "kv_cache_dtype": cache}))
    (answer,) = live.ask([ask("what shape is red?", images[0])])
    _, result, row = live.pruned[live._key(images[0], 0.778, oracle)]
    count = result.anchors.shape[1]
    total = len(answer.prompt_ids) + len(answer.token_ids) - 1  # the last token has no slot yet
    slots = slots_of_first_request(live, total)
    layers = rectified_layers(live)
    assert len(layers) == 4
    for layer in layers:
        held = read_bias(layer, slots, live.block_size)
        visual = held[PREFIX : PREFIX + count]
        assert (visual - result.log_bias[row][:, None]).abs().max() < error
        assert visual.max() > 1
        assert not held[:PREFIX].any() and not held[PREFIX + count :].any()
    first = slots[PREFIX : PREFIX + 6].tolist()
    print(f"{store}, {dtype}, cache {cache}: last layer, KV head 0, slots {first} ...")
    print("  log_bias ", [round(x, 4) for x in result.log_bias[row][:6].tolist()])
    print("  read back", [round(x, 4) for x in visual[:6, 0].tolist()])
    print(f"  {total - count} text slots: {held[:PREFIX, 0].tolist()} ...")


def test_freed_slot_reused_by_text_holds_0(engine, setup, ask, images):
    live = engine(
        setup(
            llm={
                "num_gpu_blocks_override": 4,
                "block_size": 32,
                "max_model_len": 64,
                "max_num_seqs": 1,
                "enable_prefix_caching": False,
            }
        )
    )
    (answer,) = live.ask([ask("what shape is red?", images[0])])
    used = slots_of_first_request(live, len(answer.prompt_ids))[PREFIX : PREFIX + 32]
    layer = rectified_layers(live)[-1]
    assert read_bias(layer, used, live.block_size).max() > 1
    reused: set[int] = set()
    for _ in range(4):
        (text,) = live.ask([ask("how many shapes? " * 12)])
        slots = slots_of_first_request(live, len(text.prompt_ids))
        reused |= set(slots.tolist()) & set(used.tolist())
        for layer in rectified_layers(live):
            assert not read_bias(layer, slots, live.block_size).any()
    assert reused


def test_repaired_input_is_counted_and_harms_no_neighbour(engine, setup, ask, images, exact):
    live = engine(setup())
    projector = live.model.multi_modal_projector

    def spoil(module, inputs, out):
        out = out.clone()
        out[0, :2] = float("nan")  # two of the first picture's tokens
        return out

    before = live.model.reducer.degenerate.clone()
    hook = projector.register_forward_hook(spoil)
    try:
        requests = [ask("what shape is red?", images[k], rate=0.8) for k in (10, 11)]
        answers = live.ask(requests)
    finally:
        hook.remove()
    width = live.core.vllm_config.model_config.hf_config.text_config.hidden_size
    found = (live.model.reducer.degenerate - before).tolist()
    assert found[Degenerate.NON_FINITE_EMBEDS] == 2 * width
    assert all(answer.log_probs.isfinite().all() for answer in answers)
    exact(live, requests[1:], answers[1:])


def test_padding_rows_and_text_steps_hold_no_bias(engine, setup, ask, images):
    live = engine(setup())
    live.ask([ask("what shape is red?", images[1], rate=0.5)])
    live.ask([ask("is there a red circle?")])
    assert not live.model.bias_buffer.columns.any()
