"""Engine situations beyond the first ones, each exact against the oracle, float32."""

import pytest
import torch

STORES = ["key_columns", pytest.param("value_column", marks=pytest.mark.slow)]
MODES = [
    ("original", "key_columns"),
    ("compact", "key_columns"),
    pytest.param("original", "value_column", marks=pytest.mark.slow),
]


@pytest.mark.situation("preemption")
@pytest.mark.parametrize(("positions", "store"), MODES)
def test_preemption(engine, setup, ask, images, exact, record_property, positions, store):
    # 9 free blocks of 32 for six requests that grow to 3 blocks each
    live = engine(
        setup(
            positions=positions,
            bias_store=store,
            llm={
                "num_gpu_blocks_override": 10,
                "block_size": 32,
                "max_model_len": 128,
                "max_num_seqs": 6,
            },
        )
    )
    preempted = count_preemptions(live)
    requests = [ask("how many shapes?", image) for image in images[:6]]
    answers = live.ask(requests, steps=40)
    assert preempted
    record_property("counted", f"preemptions: {len(preempted)}")
    exact(live, requests, answers)


def count_preemptions(live):
    """Record each preemption of the engine's scheduler."""
    seen = []
    scheduler = live.core.scheduler
    preempt = scheduler._preempt_request

    def counted(*args, **kwargs):
        seen.append(1)
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    return seen


@pytest.mark.situation("abort in mid-prefill")
@pytest.mark.parametrize(("positions", "store"), MODES)
def test_abort_in_mid_prefill_leaves_the_next_request_right(
    engine, setup, ask, images, exact, positions, store
):
    live = engine(
        setup(
            positions=positions,
            bias_store=store,
            llm={"max_num_batched_tokens": 16, "max_num_seqs": 4},
        )
    )
    from vllm import SamplingParams

    inner = live.llm.llm_engine
    inner.add_request("aborted", ask("how many shapes?", images[2]).prompt(), SamplingParams())
    inner.step()  # 16 of 42 prompt tokens: inside the image
    inner.abort_request(["aborted"])
    while inner.has_unfinished_requests():
        inner.step()
    requests = [ask("what shape is red?", images[2]), ask("what shape is red?", images[3])]
    exact(live, requests, live.ask(requests))


@pytest.mark.situation("an image that ends the prompt")
@pytest.mark.parametrize(("positions", "store"), MODES)
def test_image_that_ends_the_prompt(engine, setup, ask, images, exact, positions, store):
    live = engine(setup(positions=positions, bias_store=store))
    ending = ask("what shape is red?", images[0], form="USER: {text} {pictures}")
    (answer,) = live.ask([ending])
    assert answer.prompt_ids[-1] == 4
    exact(live, [ending], [answer])


@pytest.mark.situation("another rate is no false hit")
@pytest.mark.parametrize(("positions", "store"), MODES)
def test_another_rate_is_no_false_hit(engine, setup, ask, images, exact, positions, store):
    live = engine(setup(positions=positions, bias_store=store, llm={"block_size": 32}))
    for rate in (0.5, 0.778, 0.5, 0.889, 0.0):
        request = ask("what shape is blue?", images[5], rate=rate)
        (answer,) = live.ask([request])
        found = len(answer.prompt_ids) - 10
        assert found == live.config.num_anchors(144, rate)
        if rate:
            exact(live, [request], [answer])


@pytest.mark.situation("mixed batch of five")
@pytest.mark.parametrize("store", STORES)
def test_mixed_batch_of_five(engine, setup, ask, images, exact, store):
    live = engine(setup(bias_store=store))
    requests = [
        ask("what shape is red?", images[0], rate=0.944),
        ask("is there a red circle?"),
        ask("how many shapes?", images[1], images[2], images[3], rate=(0.5, 0.889, 0.0)),
        ask("what word is shown?", images[4]),
        ask("what number is shown?", images[5], images[5]),
    ]
    exact(live, requests, live.ask(requests))


@pytest.mark.situation("chunks at every awkward place")
@pytest.mark.parametrize("budget", [4, 5, 17, 34, 35, 36, 37])
@pytest.mark.parametrize("store", STORES)
def test_chunks_at_awkward_places(engine, setup, ask, images, exact, budget, store):
    # 3 tokens, 32 anchors, 3 tokens ...: borders before, at, inside and after the images
    live = engine(
        setup(bias_store=store, llm={"max_num_batched_tokens": budget, "max_num_seqs": 2})
    )
    requests = [ask("what shape is red?", images[6], images[7])]
    exact(live, requests, live.ask(requests))


@pytest.mark.parametrize("lowest", [0.0, 0.5])
def test_memory_is_profiled_for_images_at_the_lowest_rate(engine, setup, lowest):
    live = engine(setup(min_pruning_rate=lowest))
    processor = live.llm.llm_engine.renderer.mm_processor
    (image,) = processor.get_dummy_mm_inputs({"image": 1})["mm_placeholders"]["image"]
    assert image.length == 144 * (1 - lowest)


def test_memory_is_profiled_with_the_reducer_at_its_largest(
    engine, setup, ask, images, monkeypatch
):
    """At rate 0 there is nothing to prune: a full GPU would die at the first real picture."""
    from era_vllm.vllm_plugin import reducer

    calls, prune = [], reducer.prune

    def counted(tokens, num_anchors, *rest, **more):
        calls.append((tokens.segments, tokens.n, num_anchors))
        return prune(tokens, num_anchors, *rest, **more)

    monkeypatch.setattr(reducer, "prune", counted)
    live = engine(setup(min_pruning_rate=0.0, llm={"max_num_batched_tokens": 600}))
    live.runner.profile_run()  # which a CPU does not where its cache has a given size
    most = 600 // 144
    assert (most, 144, 143) in calls and (most, 144, 144) in calls
    calls.clear()
    live.ask([ask("how many shapes?", images[0], rate=0.5)])
    assert calls == [(1, 144, 72)]  # once is enough


def test_a_sliding_window_is_refused():
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import AttentionType

    from era_vllm.attention import layer
    from era_vllm.errors import UnsupportedError

    windowed = Attention.__new__(Attention)
    torch.nn.Module.__init__(windowed)
    windowed.layer_name, windowed.attn_type = "first", AttentionType.DECODER
    windowed.sliding_window = 64
    with pytest.raises(UnsupportedError, match="first: a sliding window of 64 tokens"):
        layer._check(windowed, windowed, None)
