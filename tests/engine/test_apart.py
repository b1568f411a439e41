"""Situations that need processes of their own, each exact against the oracle, float32.

In both modes of positions and with both stores; ``make test`` runs the default ones.
"""

import json

import pytest
import torch

from era_vllm.config import EraConfig
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.samples import load_samples
from era_vllm.pixels import pixel_hash
from era_vllm.types import Signal
from tests.engine.conftest import (
    CONTROL_FACTOR,
    EAGER,
    MODEL,
    SPAWNED,
    TOLERANCE,
    compare_with,
    python,
)

QUESTIONS = [["what shape is red?", 0], ["is there a red circle?", None], ["how many shapes?", 1]]
LONG_QUESTIONS = [
    [" ".join(["what shape is red?"] * 7), 0],
    [" ".join(["is there a red circle?"] * 13), None],
    [" ".join(["how many shapes?"] * 8), 1],
]
MODES = [
    pytest.param({"policy": "era", "positions": "original"}, id="original"),
    pytest.param({"policy": "era", "positions": "compact"}, id="compact", marks=pytest.mark.slow),
    pytest.param(
        {"policy": "era", "bias_store": "value_column"}, id="value_column", marks=pytest.mark.slow
    ),
]
modes = pytest.mark.parametrize("settings", MODES)


@pytest.fixture
def check(measured):
    """Compare every answer with the oracle, fed the anchors that the engine chose.

    ``chosen`` is what the engine that pruned had saved, where it is not the one that answered.
    """

    def compare(oracle, settings, saved, questions=QUESTIONS, chosen=None):
        config = EraConfig.parse(settings)
        images = [sample.image for sample in load_samples()]
        anchors = {}
        for _, kept, _, seeds, _ in (chosen or saved)["ranks"][0]:
            anchors |= dict(zip(seeds, torch.tensor(kept), strict=True))
        for (text, picture), answer in zip(questions, saved["answers"], strict=True):
            segments = []
            if picture is not None:
                image = images[picture]
                kept = anchors[pixel_hash(oracle.pixels(image)[0])]
                segments = oracle.recycle([image], config, kept[None])
            ids, found = answer["ids"][:-1], answer["log_probs"]
            error = compare_with(oracle, ids, segments, found, config)
            print(f"difference {error.exact:.1e}, without bias {error.without_bias:.1e}: {text!r}")
            control = None if picture is None else error.without_bias
            measured(config, saved["kernel"], error.exact, control, TOLERANCE)
            assert error.exact < TOLERANCE
            assert control is None or control > CONTROL_FACTOR * TOLERANCE

    return compare


@pytest.mark.situation("tensor parallel 2")
@modes
def test_tensor_parallel_2(apart, check, tmp_path, settings):
    saved = ask_ranks(apart, tmp_path / "model", settings, "tensor parallel 2")
    first, _ = saved["ranks"]  # attention, anchors, embeddings, bias of both: bit for bit the same
    oracle = Oracle(str(tmp_path / "model"))
    found = torch.tensor(first[0][0])
    images = [sample.image for sample in load_samples()[:2]]
    expected = oracle.tokens(images[: found.shape[0]]).signals[Signal.ENCODER_ATTENTION]
    assert found.shape[1:] == (4, 144)  # all heads, not a rank's two
    assert torch.allclose(expected, found, atol=1e-5)
    check(oracle, settings, saved)


FIRST_QUERIES = {"policy": "entropyprune", "policy_options": {"rest": "merged"}}
LATER_QUERIES = {
    "policy": "entropyprune",
    "policy_options": {"rest": "merged", "entropyprune_k": 2},
}


def ask_ranks(apart, model, settings, how):
    """Ask a random model with two ranks, or compiled, all of whose ranks have to see the same."""
    build = "from random_llava import save_random_llava as save; import pathlib, sys; "
    python("-c", build + "save(pathlib.Path(sys.argv[1]))", str(model))
    ranks = 2 if how == "tensor parallel 2" else 1
    saved = apart(
        {"tensor_parallel_size": ranks, "enforce_eager": ranks == 2},
        settings=settings,
        questions=QUESTIONS,
        checkpoint=str(model),
        **(EAGER if ranks == 2 else {}),
    )
    assert len(saved["ranks"]) == ranks and all(one == saved["ranks"][0] for one in saved["ranks"])
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tensor parallel 2", "torch.compile"])
@pytest.mark.parametrize(
    ("settings", "signal", "channels"),
    [
        pytest.param(FIRST_QUERIES, Signal.LANGUAGE_QUERIES, 4, id="queries of the first layer"),
        pytest.param(LATER_QUERIES, Signal.LANGUAGE_QUERIES, 4, id="queries of the second"),
        pytest.param({"policy": "dpp", "scout": 2}, Signal.SCOUT_STATES, None, id="a scout"),
        pytest.param(
            {"policy": "dpp", "scout": 2, "scout_injection": True},
            Signal.SCOUT_STATES,
            None,
            id="injected",  # exact with the oracle's states only: tests/engine/test_scout.py
        ),
    ],
)
def test_the_language_model_is_read(apart, check, tmp_path, how, settings, signal, channels):
    """All heads on every rank, and as transformers has them; its layers are called uncompiled."""
    saved = ask_ranks(apart, tmp_path / "model", settings, how)
    oracle = Oracle(str(tmp_path / "model"))
    images = {
        pixel_hash(oracle.pixels(image)[0]): image
        for image in (sample.image for sample in load_samples())
    }
    for values, _, _, seeds, _ in saved["ranks"][0]:
        expected = oracle.tokens([images[seed] for seed in seeds], EraConfig.parse(settings))
        found = torch.tensor(values)
        difference = (found - expected.signals[signal]).abs().max()
        largest = found.abs().max()
        print(f"{signal.value} {tuple(found.shape)}: {difference:.1e} of {largest:.2g}")
        assert found.shape == expected.signals[signal].shape
        assert channels in (None, found.shape[1])
        assert difference < 1e-5 * max(1.0, float(largest))
    check(oracle, settings, saved)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tensor parallel 2", "torch.compile"])
@pytest.mark.parametrize("scout", [0, 2])
def test_relevance_to_the_question(apart, check, tmp_path, how, scout):
    """The mean over all ranks' heads on every rank, and as transformers has it."""
    settings = {"policy": "cdpruner", "policy_options": {"rest": "merged"}, "question_aware": True}
    settings |= {"scout": scout}
    saved = ask_ranks(apart, tmp_path / "model", settings, how)
    oracle, asked = Oracle(str(tmp_path / "model")), {}
    for text, picture in QUESTIONS:
        if picture is not None:
            image = load_samples()[picture].image
            ids = oracle.processor.tokenizer(f"USER: <image> {text} ASSISTANT:")["input_ids"]
            question = tuple(ids[ids.index(oracle.image_token) + 1 :])
            if scout:  # "ASSISTANT :", the template's words, are the scout's to add
                question = question[:-2]
            asked[pixel_hash(oracle.pixels(image)[0])] = image, question
    for relevance, _, _, seeds, _ in saved["ranks"][0]:
        images, questions = zip(*(asked[seed] for seed in seeds), strict=True)
        expected = oracle.tokens(images, EraConfig.parse(settings), questions)
        whole = expected.signals[Signal.RELEVANCE]
        difference = float((torch.tensor(relevance) - whole).abs().max())
        print(f"relevance: difference {difference:.1e} of {float(whole.max()):.2g}")
        assert difference < 5e-6 < float(whole.max())
    check(oracle, settings, saved)


@pytest.mark.situation("torch.compile")
@modes
def test_torch_compile(apart, check, oracle, settings):
    saved = apart({"enforce_eager": False}, settings=settings, questions=QUESTIONS)
    check(oracle, settings, saved)


@pytest.mark.situation("n-gram speculation")
@modes
def test_ngram_speculation(apart, check, oracle, settings, record_property):
    method = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    saved = apart({"speculative_config": method}, settings=settings, questions=QUESTIONS, **EAGER)
    assert saved["accepted"] > 0
    record_property("counted", f"{saved['accepted']} drafts accepted")
    check(oracle, settings, saved)


@pytest.mark.situation("KV connector, another process")
@modes
def test_kv_connector_reloads_in_another_process(
    apart, check, oracle, settings, tmp_path, record_property
):
    # The images end at token 35 of a prompt of 66 or more, so that the first 64 hold all of them.
    stored = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "store")},
    }
    arguments = {"block_size": 32, "kv_transfer_config": stored}
    saving, loading = (
        apart(arguments, settings=settings, questions=LONG_QUESTIONS, **how)
        for how in (EAGER, SPAWNED)
    )
    assert saving["ranks"][0] and saving["loaded"] == 0
    assert loading["ranks"] == [[]]  # no picture was encoded or pruned
    assert loading["loaded"] == 64 * len(LONG_QUESTIONS)
    record_property("counted", f"{loading['loaded']} tokens loaded, no encoder run")
    check(oracle, settings, saving, LONG_QUESTIONS)
    check(oracle, settings, loading, LONG_QUESTIONS, chosen=saving)


LONG = (
    ("what shape is red?", 0, 7),
    ("is there a red circle?", None, 13),
    ("how many shapes?", 1, 8),
)


@pytest.mark.parametrize(
    ("cache", "hits", "known"),
    [
        pytest.param({"mm_processor_cache_gb": 0}, 0, True, marks=pytest.mark.slow),
        ({"mm_processor_cache_type": "lru"}, 4, True),  # sent without data, found in the engine
        pytest.param(  # only workers read the shared memory
            {"mm_processor_cache_type": "shm"}, 4, False, marks=pytest.mark.slow
        ),
    ],
    ids=["none", "lru", "shm"],
)
def test_a_process_of_its_own_knows_the_rows(tmp_path, cache, hits, known):
    """Of a picture: the scheduler of an engine, whose bound hangs on them."""
    words = ("run_scheduler.py", MODEL, json.dumps(cache), str(tmp_path / "out.json"))
    python(*words, **EAGER)
    found = json.loads((tmp_path / "out.json").read_text())
    tokens = 144  # of the sample model's pictures
    assert found["rows"] == [tokens if known else None] * 8  # four pictures, sent twice
    assert found["work"] == [tokens] * 8
    assert found["hits"] == hits
