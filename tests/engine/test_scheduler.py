"""The encoder's work of a step: bounded in rows before pruning, and otherwise vLLM's own steps.

First real schedulers, of both kinds, without a model; then engines.
"""

import copy
import random
from unittest.mock import create_autospec

import pytest
from vllm import SamplingParams
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

import era_vllm
from era_vllm.bench.gap_engines import UNBOUNDED, register_unbounded
from era_vllm.bench.inputs import noise_pictures
from era_vllm.lab import CHECKPOINT
from era_vllm.vllm_plugin.families import FAMILIES
from era_vllm.vllm_plugin.names import PREFIX
from era_vllm.vllm_plugin.resolve import SCHEDULER
from era_vllm.vllm_plugin.scheduler import EraScheduler
from tests.engine.conftest import TOLERANCE
from tests.engine.scheduling import Item, make, request, worker

MODEL = str(CHECKPOINT)
BOUND = 1024
PICTURES = [Item(f"picture {number}", 144, 14) for number in range(64)]
kinds = pytest.mark.parametrize("kind", ["sync", "async"])


class Own(Scheduler):
    """A user's scheduler."""


class OwnAsync(AsyncScheduler):
    """A user's asynchronous scheduler."""


@pytest.fixture(scope="module")
def config():
    """``config(kind="sync", stock=False, **arguments)``: a config, no model behind it."""
    made = {}

    def build(kind="sync", stock=False, **arguments):
        key = repr(sorted(arguments.items()))
        if key not in made:
            engine = {"dtype": "float32", "max_model_len": 2048, "max_num_seqs": 128}
            engine |= {"max_num_batched_tokens": BOUND, **era_vllm.engine_args(MODEL), **arguments}
            made[key] = EngineArgs(**engine).create_engine_config()
        found = copy.deepcopy(made[key])
        found.scheduler_config.async_scheduling = kind == "async"  # vLLM's CPU platform has none
        if stock:
            found.scheduler_config.scheduler_cls = None
        return found

    return build


def burst(scheduler, kind, pictures=PICTURES):
    """A stream that decodes, then all pictures at once, one a request."""
    run = worker(scheduler, pictures, ahead=int(kind == "async"))
    scheduler.add_request(request("stream", [5], 400))
    run.step()
    run.step()
    for picture in pictures:
        scheduler.add_request(request(picture.name, [3, picture, 4]))
    run.run()
    return run


@kinds
def test_the_rows_of_a_step_are_bounded(config, kind):
    scheduler = make(config(kind))
    assert isinstance(scheduler, AsyncScheduler) == (kind == "async")
    assert scheduler.max_num_encoder_input_tokens == BOUND
    run = burst(scheduler, kind)
    assert max(run.rows) == 7 * 144  # an eighth would be 1,152
    assert sum(run.rows) == 64 * 144  # each once
    assert run.rows[2:11] == [7 * 144] * 9  # no step is left out
    assert all(step["stream"] == 1 for step in run.tokens[1:400])


@kinds
def test_stock_vllm_exceeds_them(config, kind):
    run = burst(make(config(kind, stock=True)), kind)
    assert max(run.rows) > 6 * BOUND


@kinds
def test_an_item_larger_than_the_bound_passes_alone(config, kind):
    large = [Item("large", 5000, 500), Item("small", 10, 5), Item("other", 3000, 10)]
    run = burst(make(config(kind)), kind, large)
    assert [[item.name for item in step] for step in run.encoded if step] == [
        ["large"],
        ["small"],
        ["other"],
    ]


@kinds
@pytest.mark.parametrize("unchunked", [False, True])
def test_unpruned_items_are_scheduled_as_stock_does(config, kind, unchunked):
    arguments = {"max_num_batched_tokens": 256, "disable_chunked_mm_input": unchunked}
    steps = []
    for stock in (False, True):
        for seed in range(5):
            run = loaded(make(config(kind, stock, **arguments), 60), kind, seed, unpruned=True)
            run.run()
            steps.append((run.tokens, run.encoded))
    assert steps[:5] == steps[5:]


def loaded(scheduler, kind, seed, unpruned=False):
    """Random requests of text and up to six pictures, some of them known, some too large."""
    draw = random.Random(seed)
    items = []
    for number in range(12):
        kept = draw.choice([1, 8, 40, 120])
        rows = kept if unpruned else kept * draw.choice([1, 2, 9])
        items.append(Item(f"item {number}", rows, kept))
    run = worker(scheduler, items, ahead=int(kind == "async"))
    for number in range(20):
        parts = []
        for _ in range(draw.randrange(7)):
            parts += [draw.randrange(1, 60), draw.choice(items)]
        parts.append(draw.randrange(1, 60))
        priority = draw.randrange(3) if scheduler.scheduler_config.policy == "priority" else 0
        scheduler.add_request(
            request(f"request {number}", parts, draw.randrange(1, 80), priority=priority)
        )
        for _ in range(draw.randrange(4)):
            run.step()
    return run


@kinds
@pytest.mark.parametrize("unchunked", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_any_load_is_answered_within_the_bound(config, kind, unchunked, policy):
    arguments = {"max_num_batched_tokens": 256, "scheduling_policy": policy}
    preempted = alone = full = 0
    for seed in range(15):
        own = config(kind, disable_chunked_mm_input=unchunked, **arguments)
        scheduler = make(own, blocks=60)  # room for few: requests are preempted
        run = loaded(scheduler, kind, seed)
        run.run()
        for step, rows in zip(run.encoded, run.rows, strict=True):
            assert rows <= 256 or len(step) == 1
            alone += rows > 256
            full += 200 < rows <= 256
        preempted += run.preempted
        manager = scheduler.encoder_cache_manager
        assert not manager.request_cached_ids
        assert manager.num_freeable_slots == manager.cache_size
    assert preempted > 10 and alone > 40 and full > 40  # so all of it was met


@kinds
def test_what_is_cached_or_repeated_costs_nothing(config, kind):
    scheduler = make(config(kind))
    run = burst(scheduler, kind)
    assert scheduler.reset_prefix_cache()
    before = len(run.rows)
    fresh = [Item(f"fresh {number}", 144, 14) for number in range(7)]
    run.items |= {item.name: item for item in fresh}
    scheduler.add_request(request("fresh", [2, *fresh, 2]))
    known = list(scheduler.encoder_cache_manager.freeable)[-20:]
    scheduler.add_request(request("known", [2, *(run.items[name] for name in known), 2]))
    scheduler.add_request(request("twice", [3, fresh[0], fresh[0], 2]))
    run.step()
    assert run.rows[before] == 7 * 144
    assert run.tokens[before] == {"fresh": 2 + 98 + 2, "known": 2 + 280 + 2, "twice": 3 + 28 + 2}
    run.run()
    assert run.rows[before + 1 :] == [0] * (len(run.rows) - before - 1)


def test_what_is_loaded_from_elsewhere_costs_nothing(config):
    scheduler = make(config())
    stored = [Item(f"stored {number}", 144, 14) for number in range(20)]
    connector = create_autospec(ECConnectorBase, instance=True)
    connector.has_cache_item.side_effect = lambda name: name.startswith("stored")
    connector.ensure_cache_available.return_value = True
    connector.take_unavailable_requests.return_value = set()
    scheduler.ec_connector = connector
    run = worker(scheduler, [*stored, *PICTURES])
    run.held |= {item.name for item in stored}
    parts = [1, *stored[:10], *PICTURES[:8], *stored[10:], 1]
    scheduler.add_request(request("mixed", parts))
    run.step()
    assert run.rows == [7 * 144]
    assert run.tokens == [{"mixed": 1 + 17 * 14}]
    asked = [(one, index) for (one, index), _ in connector.update_state_after_alloc.call_args_list]
    names = sorted(one.mm_features[index].identifier for one, index in asked)
    assert names == sorted(item.name for item in [*stored[:10], *PICTURES[:7]])  # not the rest


def test_what_waits_behind_a_cut_keeps_no_cached_item(config):
    scheduler = make(config())
    run = worker(scheduler, PICTURES)
    scheduler.add_request(request("first", [1, PICTURES[0], 1]))
    run.run()
    assert scheduler.reset_prefix_cache()
    parts = [1, *PICTURES[1:9], PICTURES[0], PICTURES[1], 1]  # the eighth new one is too much
    second = request("second", parts)
    scheduler.add_request(second)
    run.step()
    assert run.tokens[-1] == {"second": 1 + 7 * 14}
    assert PICTURES[0].name in scheduler.encoder_cache_manager.freeable
    assert not scheduler.encoder_cache_manager.get_cached_input_ids(second)  # the seven are in


def test_items_of_unknown_rows_count_as_the_largest(config):
    unknown = [Item(f"unknown {number}", 144, 14, told=False) for number in range(20)]
    run = burst(make(config()), "sync", unknown)
    assert max(run.rows) == 7 * 144


@kinds
@pytest.mark.parametrize("own", [Own, OwnAsync])
@pytest.mark.parametrize("named", [True, False])
def test_a_users_own_class_is_kept(config, kind, own, named):
    given = f"{own.__module__}.{own.__name__}" if named else own
    scheduler = make(config(kind, scheduler_cls=given))
    assert isinstance(scheduler, EraScheduler) and isinstance(scheduler, own)
    assert type(scheduler).__name__ == f"Era{own.__name__}"
    if issubclass(own, AsyncScheduler) == (kind == "async"):
        assert max(burst(scheduler, kind).rows) == 7 * 144


def test_vllms_own_by_name_is_what_vllm_takes(config):
    name = "vllm.v1.core.sched.scheduler.Scheduler"
    assert type(make(config(scheduler_cls=name))) is EraScheduler
    assert type(make(config(scheduler_cls=SCHEDULER))) is EraScheduler


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no.such.Class", "cannot be imported by that name .*No module named 'no'"),
        ("Class", "needed module.Class"),
        (type("Local", (Scheduler,), {}), "not inside of a function"),
        ("vllm.v1.request.Request", "no subclass of vllm.*Scheduler"),
        (Item, "derive it from that, leave the flag out, or serve with"),
    ],
)
def test_another_class_is_refused_at_start(config, given, message):
    with pytest.raises(ValueError, match=message):  # pydantic's, around ours
        config(scheduler_cls=given)


TOKENS = 144  # of the sample model's pictures


@pytest.fixture(scope="module")
def noise():
    """64 pictures that no cache has seen."""
    pictures = noise_pictures(168)
    return [next(pictures) for _ in range(64)]


def stream_and_burst(live, pictures, steps=120):
    """Decode a stream; let all pictures come.

    Returns rows encoded in each step, whether the stream had a token in each, and the answers.
    """
    engine, ended = live.llm.llm_engine, {}
    greedy = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, logprobs=2)
    stream = SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True)
    engine.add_request("stream", {"prompt": "USER: how many shapes? ASSISTANT:"}, stream)
    rows, tokens = [], []
    while engine.has_unfinished_requests():
        before = live.encoded
        outputs = {output.request_id: output for output in engine.step()}
        ended |= {name: output for name, output in outputs.items() if output.finished}
        rows.append(TOKENS * (live.encoded - before))
        tokens.append("stream" in outputs)
        if len(rows) == 3:
            for number, picture in enumerate(pictures):
                prompt = {"prompt": "USER: <image> what shape is red? ASSISTANT:"}
                prompt["multi_modal_data"] = {"image": picture}
                prompt["mm_processor_kwargs"] = {"era": [0.9]}
                engine.add_request(f"picture {number}", prompt, greedy)
    return rows, tokens[:steps], [ended[f"picture {n}"].outputs[0] for n in range(len(pictures))]


def forget(live):
    """Empty the caches of encoder and language model, not that of the processor."""
    assert live.core.scheduler.reset_prefix_cache()
    live.core.reset_encoder_cache()


@pytest.fixture(scope="module")
def bounded(engine, setup):
    """An engine with room for all pictures at once."""
    return engine(setup(llm={"max_num_seqs": 72}))


def test_an_engine_encodes_within_the_bound(bounded, noise):
    rows, stream, together = stream_and_burst(bounded, noise)
    assert max(rows) == 7 * TOKENS <= BOUND and sum(rows) == 64 * TOKENS
    assert all(stream)
    forget(bounded)
    alone = []
    for picture in noise[:12]:
        _, _, (answer,) = stream_and_burst(bounded, [picture], steps=6)
        alone.append(answer)
        forget(bounded)
    for one, other in zip(together, alone, strict=False):
        assert one.token_ids == other.token_ids
        for left, right in zip(one.logprobs, other.logprobs, strict=True):
            first = next(iter(left))
            assert abs(left[first].logprob - right[first].logprob) < TOLERANCE
    assert len({tuple(answer.token_ids) for answer in together}) > 3  # they are not all alike


@pytest.fixture
def unbounded():
    """Known for a test, or a later one would find it among the families."""
    register_unbounded()
    yield
    del FAMILIES[UNBOUNDED.removeprefix(PREFIX)]


@pytest.mark.usefixtures("unbounded")
def test_an_engine_with_vllms_own_scheduler_exceeds_it(engine, setup, noise):
    llm = {"max_num_seqs": 72, "hf_overrides": {"architectures": [UNBOUNDED]}}
    live = engine(setup(llm=llm))
    assert type(live.core.scheduler) is Scheduler
    rows, _, _ = stream_and_burst(live, noise)
    assert max(rows) > 4 * BOUND and sum(rows) == 64 * TOKENS
