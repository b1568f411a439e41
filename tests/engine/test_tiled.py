"""Families of tiles, frames and newlines, each exact against an oracle of its own.

Random weights, so what is shown is that the engine computes the method, not that answers are good.
``make test`` runs one engine a family with chunks beside it; what needs more is slow.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from vllm.exceptions import VLLMValidationError

from era_vllm.config import EraConfig
from era_vllm.pixels import pixel_hash
from era_vllm.types import Signal
from tests.engine.conftest import CONTROL_FACTOR, EAGER, SPAWNED, STOCK_FACTOR, TOLERANCE, python
from tests.engine.families import CASES
from tests.engine.families.case import (
    CLIPS,
    ODD,
    SQUARE,
    TALL,
    TEXT,
    WIDE,
    about,
    asks_apart,
    compared,
    engine_runs,
    images,
    picture,
)
from tests.engine.test_situations import count_preemptions

LLM = {"max_model_len": 3072, "max_num_batched_tokens": 3072, "max_logprobs": 256, "block_size": 32}
APART = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 8,
    "seed": 0,
}
AT_ONCE = {"LlavaNextForConditionalGeneration", "InternVLChatModel"} | {
    "Qwen2_5_VLForConditionalGeneration"
}
"""Of each kind one, whose engines beside its own are started by `make test` too."""
TEXTS = (TEXT, "how many shapes?", "is there a red circle?")
SLIVERS = ((1, 1), (4000, 10), (10, 4000))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request):
    """A family."""
    return request.param


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    """Its checkpoint."""
    path = tmp_path_factory.mktemp(case.name)
    case.save(path)
    return path


@pytest.fixture(scope="module")
def theirs(case, folder):
    """Its oracle."""
    return case.oracle(folder)


@pytest.fixture(scope="module")
def start(case, engine, setup, folder):
    """``start(llm={...}, **settings)``: an engine of the family."""

    def begin(*, llm=None, **settings):
        arguments = {**LLM, **case.llm, **(llm or {})}
        return engine(setup(llm=arguments, model=str(folder), **settings))

    return begin


@pytest.fixture
def check(case, theirs, measured):
    """Compare every answer with the oracle; a pruned one also with what must be far off."""

    def compare(live, asks, answers, tolerance=TOLERANCE, oracle=theirs):
        for ask, answer in zip(asks, answers, strict=True):
            found = compared(live.config, live.chosen, oracle, ask, answered(answer))
            pruned = any(item.rate for item in ask.items)
            print(f"{[(i.kind, i.rate) for i in ask.items]}, {len(answer.prompt_ids)}: {found}")
            control = found.no_bias if pruned else None
            measured(live.config, live.kernel, found.exact, control, tolerance, case.name)
            assert found.exact < tolerance
            if pruned:
                controls = [found.no_bias, found.compact]
                controls += [found.tile_major] if found.tile_major is not None else []
                assert min(controls) > CONTROL_FACTOR * tolerance

    return compare


def slivers(case):
    """Return sizes of pictures that are hardly there."""
    return getattr(case, "slivers", SLIVERS)


def answered(answer):
    """Return what ``compared`` takes."""
    return answer.prompt_ids, answer.token_ids, answer.log_probs


def answers_of_a_shared_prefix(live, asks):
    """Ask two items, the same with another question, and the first with another second one."""
    encoded, answers = [live.encoded], []
    for ask in asks:
        answers += live.ask([ask])
        encoded.append(live.encoded)
    assert [b - a for a, b in zip(encoded, encoded[1:], strict=False)] == [2, 0, 1]
    assert [answer.cached_tokens >= 32 for answer in answers] == [False, True, True]
    return answers


@pytest.mark.situation("several images at different rates")
def test_pictures(case, start, check):
    live = start()
    asks = [
        images(case, TEXT, (WIDE, 0.778)),
        images(case, TEXT, (ODD, 0.944)),
        *(images(case, TEXT, (picture(*size, 5), 0.778)) for size in slivers(case)),
        images(case, TEXT, (TALL, 0.778), (SQUARE, 0.944)),
        images(case, "how many shapes?"),
        images(case, TEXT, (ODD, 0.5), (WIDE, 0.889), (TALL, 0.0)),
        images(case, "how many shapes?", (SQUARE, 0.0)),
    ]
    check(live, asks, live.ask(asks))


@pytest.mark.situation("prefix hit")
def test_prefix_hits(case, start, check):
    live = start()
    asks = [
        images(case, text, (TALL, 0.3), (second, 0.8))
        for text, second in ((TEXT, SQUARE), ("how many shapes?", SQUARE), (TEXT, ODD))
    ]
    check(live, asks, answers_of_a_shared_prefix(live, asks))


@pytest.mark.situation("chunks at every awkward place")
def test_chunks_that_end_inside_a_tile(case, start, check):
    live = start(llm={"max_num_batched_tokens": 24, "max_num_seqs": 4})
    asks = [
        images(case, TEXT, (ODD, 0.778)),
        images(case, TEXT, (WIDE, 0.778), (TALL, 0.889)),
        images(case, TEXT, (SQUARE, 0.5)),
    ]
    check(live, asks, live.ask(asks))


def test_a_picture_is_the_same_alone_and_beside_a_larger_one(case, start):
    """Its tiles are not padded to the other's: one hash, one encoding, one tower's work."""
    live, small, large = start(), picture(310, 170, 21), picture(500, 330, 22)
    before = set(live.items)

    def new():
        return {key[0] for key in set(live.items) - before}

    live.ask([images(case, TEXT, (small, 0.61))])
    (own,) = new()
    encoded = live.encoded
    live.ask([images(case, TEXT, (small, 0.61), (large, 0.61))])
    live.ask([images(case, TEXT, (large, 0.61), (small, 0.61))])
    assert live.encoded == encoded + 1
    live.ask([images(case, TEXT, (large, 0.37), (small, 0.37))])
    assert live.encoded == encoded + 3
    assert own in new() and len(new()) == 2, "the same pixels, whoever stands beside them"


@pytest.mark.parametrize(
    "case",
    [
        case if case.name in AT_ONCE else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
    ids=lambda case: case.name,
    indirect=True,
    scope="module",
)
def test_nothing_pruned_is_stock(case, start):
    """A server that can prune nothing bit for bit; rate 0 beside pruned requests nearly so."""
    asks = [images(case, TEXT, (ODD, 0.0)), images(case, TEXT, (TALL, 0.0), (SQUARE, 0.0))]
    stock, none, live = start(stock=True), start(max_pruning_rate=0), start()
    plain = [replace(ask, items=tuple(replace(i, rate=0.0) for i in ask.items)) for ask in asks]
    expected = stock.ask([_Bare(ask) for ask in plain])
    same = none.ask([_Bare(ask) for ask in plain])
    mixed = live.ask([*plain, images(case, TEXT, (WIDE, 0.9))])[: len(plain)]
    for one, other, beside in zip(expected, same, mixed, strict=True):
        assert one.prompt_ids == other.prompt_ids == beside.prompt_ids
        assert one.token_ids == other.token_ids == beside.token_ids
        assert torch.equal(one.log_probs, other.log_probs)
        assert (one.log_probs - beside.log_probs).abs().max() < TOLERANCE


class _Bare:
    """A request without a word on rates, which a stock engine would hand to transformers."""

    def __init__(self, ask):
        self.text, self._ask = ask.text, ask

    def prompt(self):
        prompt = self._ask.prompt()
        prompt.pop("mm_processor_kwargs", None)
        return prompt


@pytest.mark.parametrize("separators", ["tile_rows", "none"])
@pytest.mark.situation("other newlines")
def test_other_newlines(case, start, check, theirs, separators):
    if "Llava" not in case.name:
        pytest.skip("a family without newlines")
    live, rows = start(separators=separators), start()
    asks = [
        images(case, TEXT, (ODD, 0.778), (TALL, 0.944)),
        images(case, TEXT, (WIDE, 0.5)),
        images(case, TEXT, (SQUARE, 0.0)),
    ]
    answers, plain = live.ask(asks), rows.ask(asks)
    theirs.separators = separators
    try:
        check(live, asks, answers)
    finally:
        theirs.separators = "rows"
    counts = [(len(a.prompt_ids), len(b.prompt_ids)) for a, b in zip(answers, plain, strict=True)]
    assert all(fewer < more for fewer, more in counts[:2])
    assert counts[2][0] == counts[2][1], "at rate 0 nothing is dropped"


@pytest.mark.slow
@pytest.mark.situation("preemption")
def test_preemption(case, start, check, record_property):
    live = start(
        llm={"num_gpu_blocks_override": 16, "max_model_len": 320, "max_num_batched_tokens": 2048}
    )
    preempted = count_preemptions(live)
    pictures = [picture(300, 200 + 10 * seed, seed) for seed in range(6)]
    rate = getattr(case, "crowding", 0.85)
    asks = [images(case, "how many shapes?", (one, rate)) for one in pictures]
    answers = live.ask(asks, steps=40)
    assert preempted
    record_property("counted", f"preemptions: {len(preempted)}")
    check(live, asks, answers)


@pytest.mark.slow
@pytest.mark.situation("abort in mid-prefill")
def test_abort_in_mid_prefill_leaves_the_next_request_right(case, start, check):
    from vllm import SamplingParams

    live = start(llm={"max_num_batched_tokens": 24, "max_num_seqs": 4})
    inner = live.llm.llm_engine
    aborted = images(case, "how many shapes?", (picture(310, 210, 9), 0.5))
    inner.add_request("aborted", aborted.prompt(), SamplingParams())
    inner.step()  # ends inside a tile
    inner.abort_request(["aborted"])
    while inner.has_unfinished_requests():
        inner.step()
    asks = [replace(aborted, text=TEXT), images(case, TEXT, (TALL, 0.8))]
    check(live, asks, live.ask(asks))


@pytest.fixture
def apart(case, folder, theirs, measured, tmp_path):
    """``apart(arguments, VARIABLE=...)``: compare an engine in a process of its own."""

    def run(arguments, *, pruned=None, **variables):
        """Args: pruned: What an earlier run says of items that this one only loads."""
        arguments = {"settings": {"policy": "era"}, **arguments}
        raw = json.dumps({**LLM, **case.llm, **APART, **arguments})
        out = tmp_path / "out.pt"
        python("run_family.py", case.name, str(folder), raw, str(out), **variables)
        saved = torch.load(out)
        assert all(rank == saved["ranks"][0] for rank in saved["ranks"])
        assert len(saved["ranks"]) == arguments.get("tensor_parallel_size", 1)
        found = {
            (pixels, tuple(counts)): [
                (tuple(grid), torch.tensor(anchors), torch.tensor(assignment))
                for grid, anchors, assignment in segments
            ]
            for pixels, counts, segments in [*(pruned or ()), *saved["ranks"][0]]
        }
        config = EraConfig.parse(arguments["settings"])
        for ask, answer in zip(asks_apart(case), saved["answers"], strict=True):
            far = compared(config, found.__getitem__, theirs, ask, answer)
            print(far)
            control = far.no_bias if ask.items else None
            measured(config, "", far.exact, control, TOLERANCE, case.name)
            assert far.exact < TOLERANCE
            assert not ask.items or min(far.no_bias, far.compact) > CONTROL_FACTOR * TOLERANCE
        return saved

    return run


@pytest.mark.slow
@pytest.mark.situation("tensor parallel 2")
def test_tensor_parallel_2(apart):
    apart({"tensor_parallel_size": 2}, **EAGER)


@pytest.mark.slow
@pytest.mark.situation("encoders that share out images, TP 2")
def test_encoders_that_share_out_images(case, apart):
    """With a policy that reads no attention; the others are refused."""
    if not getattr(case, "shares_out", False):
        pytest.skip("a family whose encoder vLLM runs whole in each rank")
    arguments = {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"}
    apart({**arguments, "settings": {"policy": "dpp"}}, **EAGER)


@pytest.mark.slow
@pytest.mark.situation("n-gram speculation")
def test_ngram_speculation(case, apart, record_property):
    if not getattr(case, "mrope", False):
        pytest.skip("shown with LLaVA-1.5, of which this family differs in the prompt alone")
    method = {"method": "ngram", "num_speculative_tokens": 3}
    method |= {"prompt_lookup_min": 1, "prompt_lookup_max": 2}
    saved = apart({"speculative_config": method}, **EAGER)
    assert saved["drafted"] > 0
    counted = f"{saved['drafted']} tokens drafted, {saved['accepted']} accepted"
    record_property("counted", counted)


@pytest.mark.slow
@pytest.mark.situation("KV connector, another process")
def test_kv_connector_reloads_in_another_process(case, apart, tmp_path, record_property):
    if not getattr(case, "mrope", False):
        pytest.skip("shown with LLaVA-1.5, of which this family differs in the prompt alone")
    stored = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "store")},
    }
    arguments = {"kv_transfer_config": stored}
    saving = apart(arguments, **EAGER)
    assert saving["loaded"] == 0
    loading = apart(arguments, pruned=saving["ranks"][0], **SPAWNED)
    assert loading["loaded"] > 0
    record_property("counted", f"{loading['loaded']} tokens loaded")


@pytest.mark.slow
@pytest.mark.situation("torch.compile")
def test_torch_compile(apart):
    apart({"enforce_eager": False})


@pytest.mark.slow
@pytest.mark.situation("bf16")
def test_bf16_is_as_close_as_stock(case, start, theirs, measured):
    """The oracle is given what the engine reduced: the tower's rounding is no difference."""
    dtype = {"dtype": "bfloat16"}
    live, stock = start(llm=dtype), start(stock=True, llm=dtype)
    asks = [images(case, text, (one, 0.778)) for text in TEXTS for one in (TALL, SQUARE, ODD)]
    texts = [images(case, f"{text} {more}") for text in TEXTS for more in ("", "now", "then")]

    def errors(engine, asked, bias=True):
        rows = []
        for ask, answer in zip(asked, engine.ask(asked), strict=True):
            runs = [run for item in ask.items for run in theirs_of(engine, item)]
            ids = [*answer.prompt_ids, *answer.token_ids][:-1]
            expected = theirs.log_probs(ids, runs, len(answer.log_probs), bias=bias)
            rows.append((expected - answer.log_probs).abs().amax(-1).mean())
        return float(torch.stack(rows).mean())

    def theirs_of(engine, item):
        whole = theirs.item(item.kind, item.data)
        counts = [engine.config.num_anchors(len(p), item.rate) for _, p in whole.segments]
        pixels = whole.pixels  # what is normed in the tower comes to it as it is
        pixels = pixels.to(torch.bfloat16) if pixels.is_floating_point() else pixels
        key = pixel_hash(pixels), tuple(counts)
        return engine_runs(engine.items[key], whole)

    error, ours, text = errors(stock, texts), errors(live, asks), errors(live, texts)
    without, allowed = errors(live, asks, bias=False), STOCK_FACTOR * error
    print(f"bf16: pruned {ours:.3f}, text {text:.3f}, stock's text {error:.3f}, no bias {without}")
    measured(live.config, live.kernel, max(ours, text), without, allowed, case.name)
    assert max(ours, text) <= allowed
    assert without > CONTROL_FACTOR * allowed


@pytest.fixture
def films(case):
    """Skip a family that takes no videos."""
    if "video" not in case.marks:
        pytest.skip("a family without videos")
    return [("video", clip) for clip in CLIPS]


@pytest.mark.situation("videos")
def test_videos(case, start, check, films):
    live, (short, long) = start(), films
    asks = [
        about(case, TEXT, (*short, 0.778)),
        about(case, TEXT, (*long, 0.944)),
        about(case, TEXT, (*long, 0.889), (*short, 0.5)),
        about(case, "how many shapes?"),
        about(case, TEXT, (*short, 0.0)),
    ]
    check(live, asks, live.ask(asks))


@pytest.mark.situation("videos")
def test_a_video_is_encoded_once_and_its_prefix_is_shared(case, start, check, films):
    live, (short, long) = start(), films
    asks = [
        *(about(case, text, (*short, 0.2), (*long, 0.7)) for text in TEXTS[:2]),
        about(case, TEXT, (*short, 0.2), ("image", SQUARE, 0.6)),
    ]
    check(live, asks, answers_of_a_shared_prefix(live, asks))


@pytest.mark.situation("pictures beside videos")
def test_pictures_beside_videos(case, start, check, films):
    live, (short, long) = start(), films
    one, other = ("image", ODD), ("image", TALL)
    asks = [
        about(case, TEXT, (*one, 0.778), (*short, 0.944)),
        about(case, TEXT, (*short, 0.5), (*one, 0.889)),
        about(case, "how many shapes?"),
        about(case, TEXT, (*other, 0.889), (*long, 0.778), (*one, 0.5), (*short, 0.0)),
    ]
    check(live, asks, live.ask(asks))


@pytest.mark.situation("chunks at every awkward place")
def test_chunks_that_end_inside_a_frame(case, start, check, films):
    live = start(llm={"max_num_batched_tokens": 24, "max_num_seqs": 4})
    short, long = films
    asks = [
        about(case, TEXT, (*long, 0.5)),
        about(case, TEXT, (*short, 0.7), ("image", WIDE, 0.778)),
    ]
    check(live, asks, live.ask(asks))


def test_attention_of_the_class_token(case, start, check, theirs):
    if theirs.queries is None:
        pytest.skip("a tower without a class token")
    live, ask = start(attention_queries="cls"), images(case, TEXT, (ODD, 0.778))
    answers, of_all = live.ask([ask]), theirs.item("image", ODD).maps
    theirs.queries = "cls"
    try:
        check(live, [ask], answers)
        whole = theirs.item("image", ODD)
    finally:
        theirs.queries = "all"
    (item,) = live.items.values()
    for (_, places), own in zip(whole.segments, item.segments, strict=True):
        read = own.tokens.signals[Signal.ENCODER_ATTENTION][own.row]
        assert torch.allclose(read, whole.maps[:, places], atol=1e-6)
        assert not torch.allclose(read, of_all[:, places], atol=1e-4)


@pytest.mark.situation("several images at different rates")
def test_other_checkpoints(case, engine, setup, check, tmp_path):
    """What one class of vLLM's serves beside the case's own."""
    others = getattr(case, "others", ())
    if not others:
        pytest.skip("a family of one kind of checkpoint")
    for number, other in enumerate(others):
        path = tmp_path / str(number)
        other.save(path)
        live = engine(setup(llm={**LLM, **other.llm}, model=str(path)))
        asks = [
            images(other, TEXT, (ODD, 0.778)),
            images(other, TEXT, (TALL, 0.5), (WIDE, 0.889)),
        ]
        check(live, asks, live.ask(asks), oracle=other.oracle(path))


@pytest.mark.situation("more images than a tower pass")
def test_one_item_a_pass(case, start, check, monkeypatch):
    live, passed = start(), []
    monkeypatch.setattr(live.model, "tokens_per_pass", 1)
    asks = [images(case, TEXT, (SQUARE, 0.26), (WIDE, 0.22), (TALL, 0.28))]
    if "video" in case.marks:
        asks.append(about(case, TEXT, *(("video", clip, 0.36) for clip in CLIPS)))
    live.model.reducer.listeners.append(passed.append)
    try:
        answers = live.ask(asks)
    finally:
        live.model.reducer.listeners.remove(passed.append)
    assert [len(items) for items in passed] == [1] * sum(len(ask.items) for ask in asks)
    check(live, asks, answers)


def test_what_is_larger_than_memory_was_profiled_for_is_refused(case, start):
    """Though so few of its tokens stay that the encoder's cache has room for them."""
    if "video" not in case.marks or getattr(case, "shared", False):
        pytest.skip("a family without videos, or whose frames share a video's pixels")
    live = start(llm={"max_model_len": 768})
    info = live.llm.llm_engine.renderer.get_mm_processor().info
    busiest = info.busiest["video"]
    pictures = getattr(case, "pictures", 1) * 2 * busiest.units
    frames = np.zeros((pictures, 400, 400, 3), dtype=np.uint8)
    match = rf"got \d+ tokens in {2 * busiest.units} frames, allowed: {busiest.work}; "
    with pytest.raises(VLLMValidationError, match=match):
        live.ask([about(case, TEXT, ("video", frames, 0.94))])
    (answer,) = live.ask([about(case, TEXT, ("video", CLIPS[0], 0.94))])
    assert answer.token_ids


def test_memory_is_profiled_with_a_context_as_long_as_the_positions(case, start):
    """The largest video alone may be longer than a prompt, with the texts between its frames."""
    live = start(llm={"max_model_len": 4096, "max_num_batched_tokens": 4096})
    live.runner.profile_run()
    (answer,) = live.ask([images(case, TEXT, (TALL, 0.9))])
    assert answer.token_ids


def test_a_prompt_past_the_positions_says_so(case, start):
    """Counted with what a family writes around its runs, and before the engine is asked."""
    live = start(llm={"max_model_len": 4096, "max_num_batched_tokens": 4096})
    width, height, count = getattr(case, "far", (640, 640, 24))
    pictures = [(picture(width, height, seed), 0.94) for seed in range(count)]
    with pytest.raises(VLLMValidationError, match="long before pruning, .* the model allows 4096"):
        live.ask([images(case, TEXT, *pictures)])
    (answer,) = live.ask([images(case, TEXT, pictures[0])])
    assert answer.token_ids
