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


@pytest.mark.situation("decoding past the rope table")
def test_decoding_past_the_rope_table(engine, setup, ask, images, exact):
    live = engine(setup())
    limit = live.core.vllm_config.model_config.hf_config.text_config.max_position_embeddings
    pictures = [images[i % 12] for i in range((limit - 10) // 144)]
    filler = limit - 144 * len(pictures) - 7
    request = ask(" ".join(["red"] * filler), *pictures, rate=0.944)
    (answer,) = live.ask([request], steps=12)
    removed = (144 - 8) * len(pictures)
    assert len(answer.prompt_ids) + removed <= limit < len(answer.prompt_ids) + removed + 12
    exact(live, [request], [answer])


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
    live = engine(setup(llm={"max_model_len": 1024, "num_gpu_blocks_override": 12}))
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


@pytest.mark.parametrize("scaling", ["dynamic", "yarn"])
def test_tables_that_depend_on_their_length_are_refused(scaling):
    from transformers import LlamaConfig, LlavaConfig

    from era_vllm.errors import UnsupportedError
    from era_vllm.vllm_plugin.positions import carry_positions

    text = LlamaConfig(max_position_embeddings=64)
    text.rope_parameters = {"rope_type": scaling, "factor": 2.0, "rope_theta": 1e4}
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
    found = oracle.position_ids(ids, segments, "original")
    assert found.tolist() == [0, 1, 3, 7, 11, 12, 15, 16]
