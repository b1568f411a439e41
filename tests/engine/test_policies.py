"""The peers in the engine: what they read and choose, and what is answered, against transformers.

As published, most have no bias, so that the control is other anchors: evenly spaced ones.
"""

import pytest
import torch
import transformers

from era_vllm.lab import CHECKPOINT_QWEN3_VL
from era_vllm.lab.oracle import Oracle, Segment, first_queries
from era_vllm.types import Signal
from tests.engine import test_tiled as tiled
from tests.engine.conftest import CONTROL_FACTOR, MODEL, TOLERANCE, compare_with
from tests.engine.families.case import ODD, TEXT, WIDE, images
from tests.peers import CASES, PEERS

QUESTION = "what shape is red?"
case, folder, theirs, start = tiled.case, tiled.folder, tiled.theirs, tiled.start


def found_of(live, image, rate, oracle):
    """Return tokens and result of a picture that was pruned, the row of the call alone."""
    tokens, result, row = live.pruned[live._key(image, rate, oracle)]
    signals = {signal: value[row] for signal, value in tokens.signals.items()}
    return signals, result.anchors[row], result.log_bias[row]


def even(oracle: Oracle, image, count: int) -> list[Segment]:
    """Return evenly spaced tokens as they are."""
    embeds = oracle.tokens([image]).embeds[0]
    anchors = torch.arange(count) * len(embeds) // count
    return [Segment(embeds[anchors], torch.zeros(count), anchors, len(embeds))]


@pytest.mark.parametrize("policy", PEERS)
def test_one_image(engine, setup, ask, images, oracle, difference, policy):
    live, image, request = engine(setup(policy=policy)), images[0], ask(QUESTION, images[0])
    (answer,) = live.ask([request])
    assert len(answer.prompt_ids) == 10 + 32
    assert difference(live, request, answer).exact < TOLERANCE
    signals, anchors, log_bias = found_of(live, image, 0.778, oracle)
    assert not log_bias.any()
    expected = oracle.tokens([image], live.config)
    for signal in live.model.policy.needs:
        assert torch.allclose(signals[signal], expected.signals[signal][0], atol=1e-5), signal
    ids = [*answer.prompt_ids, *answer.token_ids][:-1]
    other = compare_with(oracle, ids, even(oracle, image, 32), answer.log_probs, live.config)
    assert other.exact > CONTROL_FACTOR * TOLERANCE
    again = oracle.reduce([image], live.config, 0.778).anchors[0].tolist()
    assert len(set(again) & set(anchors.tolist())) >= 30, "near ties apart, the same choice"


@pytest.mark.parametrize("policy", PEERS)
def test_brute_force_decides_what_the_engine_keeps(engine, setup, ask, images, oracle, policy):
    """On Hugging Face's features and signals, with nothing of the package's own mathematics."""
    live, clear = engine(setup(policy=policy)), 0
    for rate, count in ((0.778, 32), (0.944, 8)):
        live.ask([ask(QUESTION, image, rate=rate) for image in images])
        for image in images:
            expected = CASES[policy][1](oracle.tokens([image], live.config), count)
            if expected.margin > 2e-6:
                clear += 1
                _, anchors, _ = found_of(live, image, rate, oracle)
                assert anchors.tolist() == expected.anchors.tolist()
    assert clear >= 1, "float32 may rightly decide otherwise in all"


def test_the_rest_merged_has_a_bias(engine, setup, ask, images, exact):
    live = engine(setup(policy="entropyprune", policy_options={"rest": "merged"}))
    requests = [ask(QUESTION, images[1]), ask("how many shapes?", images[2], images[3])]
    exact(live, requests, live.ask(requests))


def test_queries_of_the_small_qwen3_vl_are_transformers(engine, setup, images):
    """Grouped heads, a query norm, and rows whose feature maps are no part of the token."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        CHECKPOINT_QWEN3_VL, dtype=torch.float32
    ).eval()
    path = str(CHECKPOINT_QWEN3_VL)
    processor = transformers.AutoProcessor.from_pretrained(path)
    live = engine(setup(model=path, policy="entropyprune"))
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    content = {"prompt": f"{mark}what shape is red?", "multi_modal_data": {"image": images[0]}}
    live.llm.generate(content, use_tqdm=False)
    given = processor.image_processor(images=[images[0]], return_tensors="pt")
    with torch.inference_mode():
        features = model.model.get_image_features(given["pixel_values"], given["image_grid_thw"])
        rows = features.pooler_output[0]
        expected = first_queries(model.model.language_model.layers, rows[None])
    ((item),) = live.items.values()
    (segment,) = item.segments
    read = segment.tokens.signals[Signal.LANGUAGE_QUERIES][segment.row]
    assert read.shape == expected[Signal.LANGUAGE_QUERIES].shape[1:]
    difference = (read - expected[Signal.LANGUAGE_QUERIES][0]).abs().max().item()
    print(f"queries: difference {difference:.1e} of {read.abs().max().item():.2g}")
    assert difference < 1e-5


@pytest.mark.slow
def test_every_family_gives_what_peers_read(case, start, theirs):
    """Attention of the class token, or of all where there is none; a key of each token and head."""
    live = start(policy="visionzip")
    ask = images(case, TEXT, (ODD, 0.778), (WIDE, 0.889))
    (answer,) = live.ask([ask])
    assert answer.token_ids
    before = theirs.queries
    theirs.queries = before and "cls"
    try:
        wholes = {len(w.rows): w for w in (theirs.item("image", one) for one in (ODD, WIDE))}
    finally:
        theirs.queries = before
    for item in live.items.values():
        whole = wholes[item.item.plan.layout.length]
        for (_, places), own in zip(whole.segments, item.segments, strict=True):
            signals = {signal: x[own.row] for signal, x in own.tokens.signals.items()}
            attention = signals[Signal.CLASS_ATTENTION]
            assert torch.allclose(attention, whole.maps[:, places], atol=1e-5)
            keys = signals[Signal.ENCODER_KEYS]
            assert keys.shape[0] == len(attention) and keys.shape[2] == len(places)
            assert keys.isfinite().all() and keys.std(2).min() > 1e-3


@pytest.mark.slow
def test_every_family_s_language_model_is_read(case, start, theirs):
    """Queries of the first layer, by transformers' own."""
    if not hasattr(theirs, "model"):
        pytest.skip("a family that transformers does not have")
    live = start(policy="entropyprune")
    live.ask([images(case, TEXT, (ODD, 0.778))])
    whole = theirs.item("image", ODD)
    rows = whole.rows[:, : whole.width]
    with torch.inference_mode():
        expected = first_queries(theirs.model.model.language_model.layers, rows[None])
    (item,) = live.items.values()
    for (_, places), own in zip(whole.segments, item.segments, strict=True):
        read = own.tokens.signals[Signal.LANGUAGE_QUERIES][own.row]
        close = expected[Signal.LANGUAGE_QUERIES][0][..., places]
        difference = float((read - close).abs().max())
        print(f"queries: difference {difference:.1e} of {float(read.abs().max()):.2g}")
        assert difference < 1e-4


def test_adapters_of_the_language_model_are_refused(engine, setup):
    with pytest.raises(ValueError, match="--enable-lora.* use --era-policy dpp"):
        engine(setup(policy="entropyprune", llm={"enable_lora": True}, model=MODEL))
