"""Original and compact positions: exact against the oracle, and each control fails.

The other situations (``test_exact.py`` ...) run with original positions, the default; the last
tests here run the main ones again with compact positions.
"""

import dataclasses

import pytest
import torch

from tests.engine.conftest import CONTROL_FACTOR, TOLERANCE

CLEAR = CONTROL_FACTOR * TOLERANCE


@pytest.fixture
def asked(engine, setup, ask, images, oracle):
    """One answered question about two pictures and what an oracle needs to check it."""
    live = engine(setup())
    request = ask("what shape is blue?", images[2], images[3], rate=0.889)
    (answer,) = live.ask([request])
    segments = []
    for image in request.images:
        anchors = live.anchors_of(image, 0.889, oracle)
        segments += oracle.recycle([image], live.config, anchors)
    ids = [*answer.prompt_ids, *answer.token_ids][:-1]

    def error(segments, **how):
        expected = oracle.log_probs(ids, segments, len(answer.token_ids), **how)
        return (expected - answer.log_probs).abs().max().item()

    return error, segments


def test_controls_fail(asked):
    error, segments = asked
    first, second = segments
    found = {
        "exact": error(segments),
        "without bias": error(segments, bias=False),
        "compact": error(segments, positions="compact"),
        "wrong anchors": error([moved(first), second]),
        "wrong text offset": error([first, dataclasses.replace(second, n=second.n + 1)]),
    }
    print({name: f"{value:.1e}" for name, value in found.items()})
    assert found.pop("exact") < TOLERANCE
    assert min(found.values()) > CLEAR


def moved(segment):
    """The same segment with its anchors one place to the right."""
    return dataclasses.replace(segment, anchors=(segment.anchors + 1).clamp_max(segment.n - 1))


def test_positions_that_vllm_carries(engine, setup, ask, images):
    live = engine(setup())
    seen = []
    add_to = live.model.step_state.anchor_offsets.add_to

    def spy(carried):
        seen.append(add_to(carried).clone())
        return seen[-1]

    live.model.step_state.anchor_offsets.add_to = spy
    try:
        live.ask([ask("is the order of tokens right?", images[11], rate=0.5)], steps=3)
    finally:
        del live.model.step_state.anchor_offsets.add_to
    prompt, *decoded = [x.tolist() for x in seen if len(x) != 8]  # without padded dummy batches
    (anchors,) = [r.anchors[i] for t, r, i in live.pruned.values() if r.anchors.shape[1] == 72][-1:]
    before = prompt.index(3 + anchors[0].item())
    assert prompt[before : before + 72] == [before + i for i in anchors.tolist()]
    assert prompt[before + 72] == before + 144
    assert prompt[-1] == len(prompt) - 1 + 72
    assert [x[0] for x in decoded] == [prompt[-1] + 1, prompt[-1] + 2]


@pytest.mark.situation("idle dummy batches")
def test_idle_dummy_batches_move_nothing(engine, setup, ask, images, exact):
    live = engine(setup())
    request = ask("what shape is red?", images[9])
    exact(live, [request], live.ask([request]))
    offsets = live.model.step_state.anchor_offsets
    for _ in range(3):  # what an idle data-parallel rank runs: forward without embed_input_ids
        live.runner._dummy_run(8)
        assert not offsets.offsets.any()
    exact(live, [request], live.ask([request]))


def test_prompt_beyond_the_rope_table_is_refused_and_harms_nobody(
    engine, setup, ask, images, exact
):
    from vllm.exceptions import VLLMValidationError

    live = engine(setup(llm={"max_model_len": 1024}))
    limit = live.core.vllm_config.model_config.hf_config.text_config.max_position_embeddings
    many = [images[i % 12] for i in range(limit // 144 + 1)]  # at .944 8 tokens each
    with pytest.raises(VLLMValidationError, match="--era-positions compact") as error:
        live.ask([ask("how many shapes?", *many, rate=0.944)])
    assert str(limit) in str(error.value)
    request = ask("how many shapes?", images[0], rate=0.944)
    exact(live, [request], live.ask([request]))


def test_the_same_prompt_is_served_with_compact_positions(engine, setup, ask, images):
    live = engine(setup(positions="compact"))
    limit = live.core.vllm_config.model_config.hf_config.text_config.max_position_embeddings
    many = [images[i % 12] for i in range(limit // 144 + 1)]
    (answer,) = live.ask([ask("how many shapes?", *many, rate=0.944)])
    assert len(answer.token_ids) == 9


LIMIT = 2048
"""Positions that the sample model was trained on."""


@pytest.fixture
def nearly_full(ask, images):
    """A question whose prompt leaves so many positions of ``LIMIT``, unpruned, and few tokens."""

    def make(left, rate=0.944):
        pictures = [images[i % 12] for i in range((LIMIT - 40) // 144)]
        words = LIMIT - 144 * len(pictures) - 5 - left  # <s> USER : ASSISTANT :
        return ask(" ".join(["red"] * words), *pictures, rate=rate)

    return make


@pytest.fixture
def finished():
    """Answer a request with given sampling parameters; the output, and the positions it ends at."""

    def answer(live, request, **how):
        from vllm import SamplingParams

        params = SamplingParams(**{"temperature": 0, "ignore_eos": True, **how})
        (out,) = live.llm.generate([request.prompt()], params, use_tqdm=False)
        tokens_before = len(out.prompt_token_ids) + (144 - 8) * len(request.images)
        return out, tokens_before

    return answer


@pytest.mark.parametrize(
    ("max_tokens", "expected"), [(None, 12), (900, 12), (13, 12), (12, 12), (11, 11)]
)
def test_an_answer_ends_at_the_last_trained_position(
    engine, setup, nearly_full, finished, max_tokens, expected
):
    live = engine(setup())
    out, before = finished(live, nearly_full(12), max_tokens=max_tokens)
    assert live.core.vllm_config.model_config.max_model_len - len(out.prompt_token_ids) > 500
    assert before == LIMIT - 12
    (answer,) = out.outputs
    assert (len(answer.token_ids), answer.finish_reason) == (expected, "length")


def test_every_way_to_ask_for_more_ends_there(engine, setup, nearly_full, finished):
    live = engine(setup())
    out, _ = finished(live, nearly_full(5), max_tokens=50, min_tokens=20, n=2, temperature=1)
    assert [len(answer.token_ids) for answer in out.outputs] == [5, 5]
    out, before = finished(live, nearly_full(0), max_tokens=50)
    assert before == LIMIT and len(out.outputs[0].token_ids) == 1
    # As a raw prompt, which vLLM renders late.
    from vllm import SamplingParams

    core = live.llm.llm_engine
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=50)
    core.add_request("raw", nearly_full(7).prompt(), params)
    done = []
    while core.has_unfinished_requests():
        done += [out for out in core.step() if out.finished]
    assert [len(out.outputs[0].token_ids) for out in done] == [7]


def test_beam_search_is_refused_there(engine, setup, nearly_full):
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    live = engine(setup())
    prompt = nearly_full(3).prompt()
    params = BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True)
    (found,) = live.llm.beam_search([prompt], params)
    assert len(found.sequences) == 2
    params = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
    with pytest.raises(
        VLLMValidationError, match="ask for fewer max_tokens, or serve with --era-p"
    ):
        live.llm.beam_search([prompt], params)


def test_what_is_not_pruned_or_compact_ends_as_in_stock(
    engine, setup, ask, images, nearly_full, finished
):
    live = engine(setup())
    for request in (ask("red"), ask("red", images[0], rate=0.0)):
        out, _ = finished(live, request, max_tokens=None)
        assert len(out.prompt_token_ids) + len(out.outputs[0].token_ids) == 1024
    out, _ = finished(engine(setup(positions="compact")), nearly_full(12), max_tokens=30)
    assert len(out.outputs[0].token_ids) == 30


@pytest.mark.situation("decoding past the rope table")
def test_decoding_past_the_rope_table(engine, setup, nearly_full, exact):
    """Where that is allowed; the oracle extrapolates too."""
    live = engine(setup(allow_extrapolation=True))
    request = nearly_full(3)
    (answer,) = live.ask([request], steps=12)
    before = len(answer.prompt_ids) + (144 - 8) * len(request.images)
    assert before <= LIMIT < before + 12
    exact(live, [request], [answer])


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 32),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "default", "mrope_section": [1, 1, 2]}, 64),
        ({"full": {"rope_type": "linear", "factor": 4.0}, "other": {"rope_type": "default"}}, 64),
        (None, 64),
    ],
)
def test_trained_positions(rope, expected):
    from types import SimpleNamespace

    from era_vllm.vllm_plugin.positions import longer_rope_table
    from era_vllm.vllm_plugin.trained_range import trained_positions

    text = SimpleNamespace(max_position_embeddings=64, rope_parameters=rope)
    assert trained_positions(text) == expected
    with longer_rope_table(text, 1000):
        pass
    assert trained_positions(text) == expected


def test_a_position_past_the_table_ends_at_its_last_row():
    import torch

    from era_vllm.vllm_plugin.positions import AnchorOffsets

    offsets = AnchorOffsets(4, 1, table_rows=100)
    carried = torch.tensor([[7, 99, 100, 5760]] * 3)
    assert offsets.add_to(carried).tolist() == [7, 99, 99, 99]
    assert AnchorOffsets(4, 3, table_rows=100).add_to(carried).tolist() == [[7, 99, 99, 99]] * 3


def test_more_images_than_the_table_has_rows_for_harm_nobody_else(
    engine, setup, ask, images, exact, monkeypatch
):
    """As where a prompt comes in past the processor: a wrong answer, but no NaN in the cache."""
    llm = {"max_model_len": 1024, "num_gpu_blocks_override": 12}
    live = engine(setup(allow_extrapolation=True, llm=llm))
    limit = live.core.vllm_config.model_config.hf_config.text_config.max_position_embeddings
    processor = live.llm.llm_engine.renderer.mm_processor
    many = [images[i % 12] for i in range((limit + 1024) // 144 + 8)]
    with monkeypatch.context() as patch:
        patch.setattr(type(processor), "_check_length", lambda self, length: None)
        live.ask([ask("how many shapes?", *many, rate=0.944)])
    requests = [ask("how many shapes?", images[0]), ask("what shape is red?", images[1])]
    for request in requests * 2:
        exact(live, [request], live.ask([request]))


def test_linear_scaling_makes_the_table_longer():
    from transformers import LlamaConfig

    from era_vllm.vllm_plugin.positions import rope_types, table_rows

    text = LlamaConfig(max_position_embeddings=64)
    assert table_rows(text) == 64
    text.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert (table_rows(text), rope_types(text)) == (256, {"linear"})
    text.rope_parameters = {"full": {"rope_type": "yarn"}, "sliding": {"rope_type": "default"}}
    assert rope_types(text) == {"yarn", "default"}


def test_vllms_table_of_dynamic_scaling_is_the_default_one():
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        short, long = (get_rope(32, rows, True, dynamic).cos_sin_cache for rows in (64, 200))
        plain = {"rope_type": "default", "rope_theta": 1e4}
        default = get_rope(32, 200, True, plain).cos_sin_cache
    assert torch.equal(long, default) and torch.equal(short, default[:64])


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "alpha": 2.0},
        {"rope_type": "dynamic", "factor": 2.0, "max_trained_positions": 32},
        {"rope_type": "yarn", "factor": 2.0},
    ],
    ids=str,
)
def test_tables_that_depend_on_their_length_are_refused(scaling):
    from transformers import LlamaConfig, LlavaConfig

    from era_vllm.errors import UnsupportedError
    from era_vllm.vllm_plugin.positions import carry_positions

    text = LlamaConfig(max_position_embeddings=64)
    text.rope_parameters = {**scaling, "rope_theta": 1e4}
    with pytest.raises(UnsupportedError, match="compact"):
        carry_positions(LlavaConfig(text_config=text))


@pytest.mark.situation("mixed batch of five")
def test_compact(engine, setup, ask, images, exact):
    live = engine(setup(positions="compact", llm={"block_size": 32}))
    assert not live.core.vllm_config.model_config.uses_mrope
    requests = [
        ask("what shape is red?", images[0], rate=0.944),
        ask("is there a red circle?"),
        ask("how many shapes?", images[1], images[2], images[3], rate=(0.5, 0.889, 0.0)),
        ask("what word is shown?", images[4]),
        ask("what number is shown?", images[5], images[5]),
    ]
    exact(live, requests, live.ask(requests))
    again = live.ask(requests)  # prefix hits
    assert max(answer.cached_tokens for answer in again) >= 32
    exact(live, requests, again)


@pytest.mark.situation("chunks at every awkward place")
@pytest.mark.parametrize("budget", [5, 17, 36])
def test_compact_in_chunks(engine, setup, ask, images, exact, budget):
    live = engine(
        setup(positions="compact", llm={"max_num_batched_tokens": budget, "max_num_seqs": 2})
    )
    requests = [ask("what shape is red?", images[6], images[7])]
    exact(live, requests, live.ask(requests))


@pytest.mark.situation("more images than a tower pass")
def test_tower_passes_are_as_large_as_profiled(engine, setup, ask, images, exact):
    live = engine(setup(llm={"max_num_batched_tokens": 300, "max_num_seqs": 8}))
    sizes = []
    tower = live.model.vision_tower.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]))
    )
    try:
        requests = [ask("how many shapes?", image, rate=0.944) for image in images[:6]]
        answers = live.ask(requests)
    finally:
        tower.remove()
    assert live.model.tokens_per_pass == 300  # two pictures of 144
    assert sum(sizes) == 6 and max(sizes) == 2
    exact(live, requests, answers)


def test_positions_are_part_of_an_images_identity():
    from era_vllm.config import EraConfig

    marks = {EraConfig(positions=mode).fingerprint() for mode in ("original", "compact")}
    assert len(marks) == 2


@pytest.mark.situation("images side by side")
def test_images_that_stand_side_by_side(engine, setup, ask, images, exact):
    live = engine(setup())
    form = "USER: <image><image> {text} ASSISTANT:"
    request = ask("what shape is red?", images[0], images[1], form=form)
    exact(live, [request], live.ask([request]))


def test_what_the_oracle_calls_original(oracle):
    from era_vllm.lab.oracle import Segment

    nothing = torch.zeros(2, 4), torch.zeros(2)
    segments = [
        Segment(*nothing, torch.tensor([1, 5]), 9),
        Segment(*nothing, torch.tensor([0, 3]), 4),
    ]
    token = oracle.image_token
    ids = torch.tensor([7, 8, token, token, 7, token, token, 8])
    found = oracle.position_ids(ids == oracle.image_token, segments, "original")
    assert found.tolist() == [0, 1, 3, 7, 11, 12, 15, 16]
