"""The real engine against the oracle, whole vocabulary, last prompt token + 8 decode steps.

Each test with a pruned request must also fail without the bias, by at least three tolerances.
"""

import pytest
import torch

from era_vllm.types import Signal
from tests import oracle as method
from tests.engine.conftest import CONTROL_FACTOR, TOLERANCE, Segment, compare_with


@pytest.mark.situation("one image")
@pytest.mark.parametrize("policy", ["era", "dpp", "random", "uniform", "pool"])
def test_one_image(engine, setup, ask, images, exact, policy):
    live = engine(setup(policy=policy))
    requests = [ask("what shape is red?", images[0])]
    answers = live.ask(requests)
    assert len(answers[0].prompt_ids) == 10 + 32
    exact(live, requests, answers)


@pytest.mark.parametrize(
    "options",
    [
        {"saliency": "logit"},
        {"saliency": "zscore", "search": "multiplicative"},
        {"search": "dpp", "centroid": "weighted"},
        {"weighting": "saliency", "matching": "dot"},
    ],
    ids=str,
)
def test_policy_options(engine, setup, ask, images, exact, options):
    live = engine(setup(policy_options=options))
    requests = [ask("what shape is red?", images[1])]
    exact(live, requests, live.ask(requests))


@pytest.mark.parametrize(
    "settings", [{"attention_layer": 2}, {"attention_queries": "cls"}], ids=str
)
def test_attention_settings(engine, setup, ask, images, oracle, exact, settings):
    live = engine(setup(**settings))
    requests = [ask("what shape is red?", images[1])]
    exact(live, requests, live.ask(requests))
    key = live._key(images[1], 0.778, oracle)
    tokens, _, row = live.pruned[key]
    expected = oracle.tokens([images[1]], live.config).signals[Signal.ENCODER_ATTENTION][0]
    assert torch.allclose(tokens.signals[Signal.ENCODER_ATTENTION][row], expected, atol=1e-6)
    other = oracle.tokens([images[1]]).signals[Signal.ENCODER_ATTENTION][0]
    assert not torch.allclose(tokens.signals[Signal.ENCODER_ATTENTION][row], other, atol=1e-4)


@pytest.mark.situation("several images")
def test_value_column_store(engine, setup, ask, images, exact):
    live = engine(setup(bias_store="value_column"))
    requests = [
        ask("what shape is blue?", images[2], images[3]),
        ask("is there a red circle?"),
        ask("how many shapes?", images[4], rate=0.944),
    ]
    exact(live, requests, live.ask(requests))


def test_merge_off(engine, setup, ask, images, oracle):
    live = engine(setup(merge=False))
    live.ask([ask("what shape is red?", images[0])])
    tokens, result, row = live.pruned[live._key(images[0], 0.778, oracle)]
    assert torch.equal(result.embeds[row], tokens.embeds[row][result.anchors[row]])
    assert result.log_bias[row].max() > 0


def test_bias_off(engine, setup, ask, images, oracle, difference):
    live = engine(setup(bias=False))
    requests = [ask("what shape is red?", images[0])]
    (answer,) = live.ask(requests)
    found = difference(live, requests[0], answer)
    assert found.without_bias < TOLERANCE
    assert found.exact > CONTROL_FACTOR * TOLERANCE


@pytest.mark.situation("several images")
def test_two_images(engine, setup, ask, images, exact):
    live = engine(setup())
    requests = [ask("what shape is blue?", images[2], images[3])]
    exact(live, requests, live.ask(requests))


def test_image_and_text_only_requests_in_one_batch(engine, setup, ask, images, exact):
    live = engine(setup())
    requests = [
        ask("is there a red circle?"),
        ask("how many shapes?", images[4]),
        ask("what color is the star?"),
        ask("what word is shown?", images[5], images[4]),
    ]
    exact(live, requests, live.ask(requests))


@pytest.mark.situation("prefix hit")
def test_prefix_hit_with_the_same_and_with_another_question(engine, setup, ask, images, exact):
    # two pictures, so that a whole block of 32 slots lies within them
    live = engine(setup(llm={"block_size": 32}))
    pictures = images[6], images[7]
    first = ask("what number is shown?", *pictures)
    exact(live, [first], live.ask([first]))
    encoded = live.encoded
    for question in ("what number is shown?", "how many shapes?"):
        request = ask(question, *pictures)
        (answer,) = live.ask([request])
        assert answer.cached_tokens >= 32
        assert live.encoded == encoded  # neither picture went through the tower again
        exact(live, [request], [answer])


@pytest.mark.situation("chunks at every awkward place")
def test_chunked_prefill_splits_an_image(engine, setup, ask, images, exact):
    live = engine(setup(llm={"max_num_batched_tokens": 16, "max_num_seqs": 4}))
    written = []
    write = live.model.bias_buffer.write
    live.model.bias_buffer.write = lambda mask, bias: (written.append(len(bias)), write(mask, bias))
    try:
        requests = [ask("what word is shown?", images[8])]
        answers = live.ask(requests)
    finally:
        live.model.bias_buffer.write = write
    assert sum(written) == 32 and len(written) == 3  # 3 + 32 tokens in chunks of 16
    exact(live, requests, answers)


@pytest.mark.situation("two engines in one process")
def test_two_engines_with_different_settings_in_one_process(engine, setup, ask, images, exact):
    one, other = engine(setup()), engine(setup(policy="dpp", pruning_rate=0.5))
    requests = [ask("what shape is red?", images[9])]
    for _ in range(2):
        for live in (one, other):
            exact(live, requests, live.ask(requests))
    assert one.model.policy != other.model.policy


@pytest.mark.situation("several images at different rates")
def test_rates_of_one_request_may_differ(engine, setup, ask, images, exact):
    live = engine(setup())
    requests = [ask("what shape is red?", images[0], images[10], rate=(0.5, 0.944))]
    (answer,) = live.ask(requests)
    assert len(answer.prompt_ids) == 10 + 72 + 8
    exact(live, requests, [answer])


def test_rate_0_with_the_plugin_on_is_stock(engine, setup, ask, images):
    requests = [
        ask("what shape is red?", images[0], rate=0.0),
        ask("is there a red circle?"),
        ask("how many shapes?", images[1], images[2], rate=0.0),
    ]
    pruned = engine(setup()).ask(requests)
    stock = engine(setup(stock=True)).ask([ask(r.text, *r.images) for r in requests])
    for ours, theirs in zip(pruned, stock, strict=True):
        assert ours.prompt_ids == theirs.prompt_ids
        assert ours.token_ids == theirs.token_ids
        assert (ours.log_probs - theirs.log_probs).abs().max() < 1e-5


def test_maximum_rate_0_is_stock_bit_for_bit(engine, setup, ask, images):
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    off, stock = engine(setup(max_pruning_rate=0.0)), engine(setup(stock=True))
    assert type(off.model) is LlavaForConditionalGeneration
    requests = [ask("what shape is red?", images[3]), ask("is there a red circle?")]
    for ours, theirs in zip(off.ask(requests), stock.ask(requests), strict=True):
        assert ours.token_ids == theirs.token_ids
        assert torch.equal(ours.log_probs, theirs.log_probs)


@pytest.mark.parametrize("rate", [0.5, 0.778, 0.944])
def test_the_method_in_numpy_decides_what_the_engine_answers(
    engine, setup, ask, images, oracle, rate
):
    """From Hugging Face's features and attention, with nothing of the package's own mathematics."""
    live, clear = engine(setup(preset="paper")), 0
    for image in images[:6]:
        request = ask("what shape is red?", image, rate=rate)
        (answer,) = live.ask([request])
        tokens = oracle.tokens([image])
        embeds = tokens.embeds[0].double().numpy()
        attention = tokens.signals[Signal.ENCODER_ATTENTION][0].double().numpy()
        found, result, row = live.pruned[live._key(image, rate, oracle)]
        chosen = method.select(embeds, attention, result.anchors.shape[1], 0.5, 0.3)
        merged = method.recycle(embeds, chosen.anchors, method.head_entropy(attention), 0.39)
        if min(chosen.margin, merged.margin) < 1e-5:
            continue  # float32 may rightly decide otherwise
        clear += 1
        assert result.anchors[row].tolist() == chosen.anchors.tolist()
        assert result.assignment[row].tolist() == merged.assignment.tolist()
        bias = torch.from_numpy(merged.mass).log().float()
        torch.testing.assert_close(result.log_bias[row], bias, rtol=0, atol=1e-4)
        segment = Segment(
            torch.from_numpy(merged.embeds).float(), bias, torch.from_numpy(chosen.anchors), found.n
        )
        ids = [*answer.prompt_ids, *answer.token_ids][:-1]
        difference = compare_with(oracle, ids, [segment], answer.log_probs, live.config)
        assert difference.exact < TOLERANCE
        assert difference.without_bias > CONTROL_FACTOR * TOLERANCE
    assert clear >= 3
