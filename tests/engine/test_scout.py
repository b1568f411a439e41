"""The scout in the engine: its states, what is chosen by them and what is answered.

Against Hugging Face's own layers on prefix and picture. The control beside the one without the bias
are the clusters of an engine that has no scout.
"""

from dataclasses import replace

import pytest
import torch

from era_vllm.config import EraConfig
from era_vllm.lab.oracle import first_queries
from era_vllm.lab.scout import chat_prefix, scout_states
from era_vllm.pixels import pixel_hash
from era_vllm.types import Signal
from era_vllm.vllm_plugin.families import family_of
from tests.engine import test_tiled as tiled
from tests.engine.conftest import CONTROL_FACTOR, MODEL, TOLERANCE, compare_with
from tests.engine.families.case import CLIPS, ODD, SQUARE, TALL, TEXT, WIDE, about, compared
from tests.engine.families.case import images as of_case
from tests.engine.test_situations import count_preemptions
from tests.engine.test_tiled import answered
from tests.peers import CASES

CLOSE = 1e-5
case, folder, theirs, start = tiled.case, tiled.folder, tiled.theirs, tiled.start


def read(live, image, oracle, signal=Signal.SCOUT_STATES, rate=0.778):
    """Return a signal of a picture as the engine had it, and by transformers."""
    tokens, _, row = live.pruned[live._key(image, rate, oracle)]
    expected = oracle.tokens([image], live.config).signals[signal][0]
    found = tokens.signals[signal][row]
    assert found.shape == expected.shape and found.dtype == torch.float32
    difference = float((found - expected).abs().max())
    print(f"{signal.value}: difference {difference:.1e} of {float(expected.abs().max()):.2g}")
    assert difference < CLOSE * max(1.0, float(expected.abs().max()))
    return found


def test_the_prefix_is_the_chat_template_s(engine, setup, oracle):
    live = engine(setup(policy="dpp", scout=1))
    text = oracle.processor.tokenizer.decode(live.model.era.scout_prefix)
    assert text.split() == ["<s>", "USER:"]
    assert list(live.model.era.scout_prefix) == chat_prefix(oracle.processor, oracle.image_token)
    assert live.model.era.fingerprint() != live.config.fingerprint(), "part of every cache key"


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "dpp", "scout": 1},
        {"policy": "dpp", "scout": 2},
        {"policy": "dpp", "scout": 4, "scout_prefix": []},
        {"policy": "era", "scout": 2},
    ],
    ids=str,
)
def test_answers_are_exact_with_the_scout_s_clusters(
    engine, setup, ask, images, oracle, exact, difference, settings
):
    live = engine(setup(**settings))
    requests = [
        ask("what shape is red?", images[0]),
        ask("how many shapes?", images[1], images[2], images[3]),
        ask("is there a red circle?"),
        ask("what word is shown?", images[4], images[0], rate=(0.944, 0.5)),
    ]
    answers = live.ask(requests)
    exact(live, requests, answers)
    apart = 0
    for image in images[:4]:
        read(live, image, oracle)
        anchors = live.anchors_of(image, 0.778, oracle)
        again = oracle.reduce([image], live.config, 0.778).anchors
        assert len(set(again[0].tolist()) & set(anchors[0].tolist())) >= 31
        without = EraConfig.parse({"policy": settings["policy"]})
        plain = oracle.reduce([image], without, 0.778).anchors
        apart += len(set(plain[0].tolist()) - set(anchors[0].tolist()))
    assert apart > 4 * 4, "without a scout others are chosen"
    ids = [*answers[0].prompt_ids, *answers[0].token_ids][:-1]
    segments = oracle.recycle([images[0]], without, live.anchors_of(images[0], 0.778, oracle))
    control = compare_with(oracle, ids, segments, answers[0].log_probs, live.config)
    assert control.exact > CONTROL_FACTOR * TOLERANCE, "nor merged as without one"


def test_another_prefix_gives_other_states(engine, setup, ask, images, oracle):
    live = engine(setup(policy="dpp", scout=2))
    live.ask([ask("what shape is red?", images[0])])
    found = read(live, images[0], oracle)
    config = EraConfig.parse({"policy": "dpp", "scout": 2, "scout_prefix": []})
    other = oracle.tokens([images[0]], config).signals[Signal.SCOUT_STATES][0]
    assert (found - other).abs().max() > 1e-2


def test_prefix_hit(engine, setup, ask, images, exact):
    live = engine(setup(policy="dpp", scout=2, llm={"block_size": 32}))
    pictures = images[6], images[7]
    first = ask("what number is shown?", *pictures)
    exact(live, [first], live.ask([first]))
    encoded = live.encoded
    request = ask("how many shapes?", *pictures)
    (answer,) = live.ask([request])
    assert answer.cached_tokens >= 32 and live.encoded == encoded
    exact(live, [request], [answer])


def test_chunked_prefill(engine, setup, ask, images, exact):
    live = engine(setup(policy="dpp", scout=2, llm={"max_num_batched_tokens": 16}))
    requests = [ask("what word is shown?", images[8]), ask("how many shapes?", images[9])]
    exact(live, requests, live.ask(requests))


def test_pictures_are_run_a_few_at_once(engine, setup, ask, images, oracle):
    """The states of a picture are its own, whatever stands beside it."""
    live = engine(setup(policy="dpp", scout=2))
    (scout,) = [source for source in live.model.sources if Signal.SCOUT_STATES in source.gives]
    live.ask([ask("how many shapes?", *images[10:13])])
    together = [read(live, image, oracle) for image in images[10:13]]
    most, scout._most = scout._most, 1
    try:
        live.ask([ask("how many shapes?", *images[10:13], rate=0.7)])
    finally:
        scout._most = most
    for image, before in zip(images[10:13], together, strict=True):
        assert (read(live, image, oracle, rate=0.7) - before).abs().max() < CLOSE


@pytest.mark.parametrize(("k", "scout"), [(2, 0), (3, 1), (2, 3)])
def test_entropyprune_reads_a_later_layer(engine, setup, ask, images, oracle, exact, k, scout):
    options = {"entropyprune_k": k, "rest": "merged"}
    live = engine(setup(policy="entropyprune", policy_options=options, scout=scout))
    requests = [ask("what shape is red?", images[0]), ask("how many shapes?", images[1])]
    exact(live, requests, live.ask(requests))
    clear = 0
    for image in images[:2]:
        found = read(live, image, oracle, Signal.LANGUAGE_QUERIES)
        first = oracle.tokens([image]).signals[Signal.LANGUAGE_QUERIES][0]
        assert (found - first).abs().max() > 1e-2, "layer 0's are others"
        expected = CASES["entropyprune"][1](oracle.tokens([image], live.config), 32)
        if expected.margin > 2e-6:
            clear += 1
            anchors = live.anchors_of(image, 0.778, oracle)
            assert anchors[0].tolist() == expected.anchors.tolist()
    assert clear >= 1
    gives = set().union(*(source.gives for source in live.model.sources))
    assert (Signal.SCOUT_STATES in gives) == bool(scout)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"scout": 5}, "scout: got layer 5 .* allowed: up to 4"),
        (
            {"policy": "entropyprune", "policy_options": {"entropyprune_k": 5}},
            "scout: got layer 5 .* allowed: up to 4",
        ),
        ({"scout": 1, "llm": {"enable_lora": True}}, r"--enable-lora\) with a scout"),
    ],
    ids=str,
)
def test_refused(engine, setup, settings, match):
    with pytest.raises(ValueError, match=match):
        engine(setup(model=MODEL, **settings))


def test_queries_of_the_first_layer_need_no_scout(engine, setup, oracle):
    live = engine(setup(policy="entropyprune"))
    assert live.model.era.scout_prefix is None
    assert first_queries and not any(
        Signal.SCOUT_STATES in source.gives for source in live.model.sources
    )


def without_states(segments):
    """Return segments that enter no layer with anything: the control."""
    return [replace(segment, states=None) for segment in segments]


@pytest.fixture
def injected(exact, oracle):
    """Assert that answers are exact with injection, and far off without."""

    def check(live, requests, answers):
        exact(live, requests, answers)
        for request, answer in zip(requests, answers, strict=True):
            rates = request.rate or (live.config.pruning_rate,) * len(request.images)
            pairs = list(zip(request.images, rates, strict=True))
            if not any(rate for _, rate in pairs):
                continue
            segments = []
            for image, rate in pairs:
                anchors = live.anchors_of(image, rate, oracle)
                segments += oracle.recycle([image], live.config, anchors)
                assert (segments[-1].states is None) == (rate == 0)
            ids = [*answer.prompt_ids, *answer.token_ids][:-1]
            bare = without_states(segments)
            control = compare_with(oracle, ids, bare, answer.log_probs, live.config).exact
            print(f"without injection {control:.1e}")
            assert control > CONTROL_FACTOR * TOLERANCE

    return check


INJECTED = {"policy": "dpp", "scout": 2, "scout_injection": True}


@pytest.mark.parametrize(
    "settings",
    [
        INJECTED,
        {**INJECTED, "scout": 1},
        {**INJECTED, "scout": 4, "policy": "era", "positions": "compact"},
        {**INJECTED, "bias_store": "value_column"},
    ],
    ids=str,
)
def test_injection(engine, setup, ask, images, injected, settings):
    live = engine(setup(**settings))
    requests = [
        ask("what shape is red?", images[0]),
        ask("is there a red circle?"),
        ask("how many shapes?", images[1], images[2], images[3]),
        ask("what word is shown?", images[4], images[5], images[0], rate=(0.944, 0.0, 0.5)),
    ]
    injected(live, requests, live.ask(requests))
    text = [ask("is there a red circle?"), ask("what color is the star?")]
    injected(live, text, live.ask(text))  # what the last pictures left behind is not seen


def test_nothing_is_injected_where_nothing_is_pruned(engine, setup, ask, images):
    requests = [ask("what shape is red?", images[0], rate=(0.0,))]
    (ours,) = engine(setup(**INJECTED)).ask(requests)
    (theirs,) = engine(setup(stock=True)).ask([ask("what shape is red?", images[0])])
    assert ours.prompt_ids == theirs.prompt_ids and ours.token_ids == theirs.token_ids
    assert (ours.log_probs - theirs.log_probs).abs().max() < 1e-5


def test_injection_on_prefix_hits(engine, setup, ask, images, injected):
    live = engine(setup(llm={"block_size": 32}, **INJECTED))
    pictures = images[6], images[7]
    first = ask("what number is shown?", *pictures)
    injected(live, [first], live.ask([first]))
    encoded = live.encoded
    for question in ("what number is shown?", "how many shapes?"):
        request = ask(question, *pictures)
        (answer,) = live.ask([request])
        assert answer.cached_tokens >= 32 and live.encoded == encoded
        injected(live, [request], [answer])


def test_injection_in_chunks(engine, setup, ask, images, injected):
    live = engine(setup(llm={"max_num_batched_tokens": 16, "max_num_seqs": 4}, **INJECTED))
    written = []
    write = live.model.step_state.injected.write
    live.model.step_state.injected.write = lambda mask, rows: (
        written.append(len(rows)),
        write(mask, rows),
    )
    try:
        requests = [ask("what word is shown?", images[8])]
        answers = live.ask(requests)
    finally:
        live.model.step_state.injected.write = write
    assert sum(written) == 32 and len(written) == 3
    injected(live, requests, answers)


def test_injection_after_preemption(engine, setup, ask, images, injected):
    few = {"num_gpu_blocks_override": 10, "block_size": 32, "max_model_len": 128}
    live = engine(setup(llm={**few, "max_num_seqs": 6}, **INJECTED))
    preempted = count_preemptions(live)
    requests = [ask("how many shapes?", image) for image in images[:6]]
    answers = live.ask(requests, steps=40)
    assert preempted
    injected(live, requests, answers)


def test_injection_without_a_scout_is_refused(engine, setup):
    with pytest.raises(ValueError, match="scout_injection: got true without a scout"):
        engine(setup(model=MODEL, scout_injection=True))


class Scouted:
    """A family's oracle whose items have a scout's states, and each layer's behind their rows."""

    def __init__(self, theirs, prefix, layers, *, injects):
        self.theirs, self.prefix, self.layers = theirs, list(prefix), layers
        self.injects, self.width = injects, 0
        self.model = theirs.model.model.language_model

    def item(self, kind, data):
        whole = self.theirs.item(kind, data)
        self.width = whole.rows.shape[1]
        rows, *maps = whole.rows.split(whole.width or self.width, 1)
        more = {"position_ids": self.places(whole)}
        if maps:
            visual = torch.arange(more["position_ids"].shape[-1]) >= len(self.prefix)
            more |= {"visual_pos_masks": visual[None], "deepstack_visual_embeds": maps}
        states = scout_states(self.model, self.prefix, rows[None], self.layers, more)[0]
        of_layers = [
            scout_states(self.model, self.prefix, rows[None], layer, more, with_maps=False)[0]
            for layer in range(1, self.layers + 1)
        ]
        wide = torch.cat([whole.rows, *of_layers], 1)
        return replace(whole, rows=wide, width=rows.shape[1], states=states)

    def places(self, whole):
        """Positions of prefix and item, token by token; spelled out."""
        start = len(self.prefix)
        if whole.offsets is None:
            return torch.arange(start + len(whole.rows))[None]
        found = [[place] * 3 for place in range(start)]
        runs, offsets = whole.runs or (len(whole.rows),), whole.offsets.tolist()
        for run, span in zip(runs, whole.spans, strict=True):
            found += [[start + offset for offset in offsets.pop(0)] for _ in range(run)]
            start += span
        return torch.tensor(found).T[:, None]

    def log_probs(self, ids, segments, last, **how):
        return self.theirs.log_probs(ids, [self.split(one) for one in segments], last, **how)

    def split(self, segment):
        rows, states = segment.embeds[:, : self.width], segment.embeds[:, self.width :]
        states = states.unflatten(1, (self.layers, -1))
        pruned = bool(segment.log_bias.any()) and self.injects
        return replace(segment, embeds=rows, states=states if pruned else None)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"scout": 1}, {"scout": 2, "scout_injection": True}], ids=str)
def test_families(case, start, theirs, settings):
    """Tiles, newlines, three axes, feature maps, videos: states, anchors and answers."""
    if not hasattr(theirs, "model"):
        pytest.skip("a family that transformers does not have")
    live = start(**settings)
    era = live.model.era
    asks = [
        of_case(case, TEXT, (ODD, 0.778)),
        of_case(case, "how many shapes?"),
        of_case(case, TEXT, (TALL, 0.5), (WIDE, 0.9), (SQUARE, 0.0)),
    ]
    if "video" in case.marks:
        asks.append(about(case, TEXT, ("video", CLIPS[0], 0.778), ("image", SQUARE, 0.9)))
    answers = live.ask(asks)
    if family_of(live.model.config).opening:
        prompt = answers[0].prompt_ids
        first = min(prompt.index(mark) for mark in theirs.visual_tokens if mark in prompt)
        assert era.scout_prefix[-1] == prompt[first - 1], "the processor's own is in the prefix"
    oracle = Scouted(theirs, era.scout_prefix, era.scout, injects=era.scout_injection)
    for one, answer in zip(asks, answers, strict=True):
        found = compared(live.config, live.chosen, oracle, one, answered(answer))
        print(f"{[(i.kind, i.rate) for i in one.items]}, {len(answer.prompt_ids)}: {found}")
        assert found.exact < TOLERANCE
        if one.items:
            controls = [found.no_bias, found.compact]
            if found.tile_major is not None and not era.scout_injection:
                controls.append(found.tile_major)  # two layers, injected, know no order
            assert min(controls) > CONTROL_FACTOR * TOLERANCE
    whole = oracle.item("image", ODD)
    item = live.items[next(key for key in live.items if key[0] == pixel_hash(whole.pixels))]
    for (_, places), own in zip(whole.segments, item.segments, strict=True):
        read = own.tokens.signals[Signal.SCOUT_STATES][own.row].T
        difference = float((read - whole.states[places]).abs().max())
        largest = float(read.abs().max())
        print(f"states: difference {difference:.1e} of {largest:.2g}")
        assert difference < CLOSE * max(1.0, largest)
        assert (read - whole.rows[places][:, : read.shape[1]]).abs().max() > 1e-2
    if era.scout_injection:
        control = Scouted(theirs, era.scout_prefix, era.scout, injects=False)
        found = compared(live.config, live.chosen, control, asks[0], answered(answers[0]))
        print(f"without injection {found.exact:.1e}")
        assert found.exact > CONTROL_FACTOR * TOLERANCE
