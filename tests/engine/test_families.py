"""The contract of a family: a toy one, in one file, is exact without a change anywhere else."""

import dataclasses

import pytest
import torch

from era_vllm.lab.oracle import Segment
from era_vllm.pipeline import prune
from era_vllm.plan import plan
from era_vllm.policies import make_policy
from era_vllm.types import Signal, VisualTokens
from era_vllm.vllm_plugin.families import FAMILIES, Family
from era_vllm.vllm_plugin.register import register_family
from tests.engine.conftest import CONTROL_FACTOR, TOLERANCE, Request, compare_with

NAME = "ToyForConditionalGeneration"


@pytest.fixture(scope="module")
def toy(engine, setup):
    """An engine of the toy family, with the sample model's weights."""
    register_family(NAME, Family(f"tests.engine.toy_family:Era{NAME}"))
    yield engine(setup(llm={"hf_overrides": {"architectures": [f"Era{NAME}"]}}))
    del FAMILIES[NAME]


def runs(live, oracle, image, rate) -> list[Segment]:
    """What stands in place of a picture's two runs: by the oracle's features, packed here."""
    from tests.engine import toy_family as family

    tokens = oracle.tokens([image], live.config)
    newline = oracle.model.get_input_embeddings().weight[family.NEWLINE]
    rows = family.packed(tokens.embeds[0], newline)
    attention = tokens.signals[Signal.ENCODER_ATTENTION][0]
    maps = torch.cat(
        [
            attention[:, : family.FIRST],
            torch.nn.functional.pad(
                attention[:, family.FIRST :].unflatten(1, (-1, family.SIDE)), (0, 1)
            ).flatten(1),
        ],
        1,
    )
    layout = live.model.adapter.layout(None, "image", ())
    found = []
    start = 0
    counts = plan(layout, rate, live.config).num_anchors
    for segment, count, length in zip(layout.segments, counts, layout.run_lengths, strict=True):
        given = {Signal.ENCODER_ATTENTION: maps[None, :, segment.places]}
        own = VisualTokens(rows[segment.places][None], segment.grid, given)
        result = prune(own, count, make_policy(live.config))
        ends = [p for p in layout.separators.tolist() if start <= p < start + length]
        places = torch.cat([segment.places[result.anchors[0]], torch.tensor(ends, dtype=int)])
        order = places.argsort()
        embeds = torch.cat([result.embeds[0], rows[ends]])[order]
        bias = torch.cat([result.log_bias[0], torch.zeros(len(ends))])[order]
        found.append(Segment(embeds, bias, places[order] - start, length))
        start += length
    return found


def check(live, oracle, requests, answers, measured):
    """Compare each answer with the oracle, and with one without the bias or with compact places."""
    for request, answer in zip(requests, answers, strict=True):
        rates = request.rate if isinstance(request.rate, tuple) else [request.rate] * 9
        pairs = zip(request.images, rates, strict=False)
        segments = [run for image, rate in pairs for run in runs(live, oracle, image, rate)]
        ids = [*answer.prompt_ids, *answer.token_ids][:-1]
        found = compare_with(oracle, ids, segments, answer.log_probs, live.config)
        control = found.without_bias if segments else None
        measured(live.config, live.kernel, found.exact, control, TOLERANCE)
        assert found.exact < TOLERANCE, request
        if not segments:
            continue
        assert found.without_bias > CONTROL_FACTOR * TOLERANCE, request
        compact = dataclasses.replace(live.config, positions="compact")
        moved = compare_with(oracle, ids, segments, answer.log_probs, compact)
        assert moved.exact > CONTROL_FACTOR * TOLERANCE, request


@pytest.mark.situation("a family of one file: two runs, newlines, unequal segments")
def test_a_family_is_one_file_and_its_row(toy, oracle, ask, images, measured):
    two = "USER: <image><image> {text} ASSISTANT:"
    requests = [
        ask("what shape is red?", images[1], rate=0.778),
        ask("how many shapes?", images[2], rate=0.944),
        ask("is there a red circle?", images[3], images[4], rate=(0.5, 0.9), form=two),
        ask("how are you?"),
    ]
    check(toy, oracle, requests, toy.ask(requests), measured)


def test_the_pictures_are_encoded_once_and_their_prefix_is_shared(
    toy, oracle, ask, images, measured
):
    requests = [Request(text, (images[5],), 0.1) for text in ("what shape is red?", "how many?")]
    first = toy.ask(requests[:1])
    encoded = toy.encoded
    second = toy.ask(requests[1:])
    assert toy.encoded == encoded and second[0].cached_tokens > 0
    check(toy, oracle, requests, [*first, *second], measured)


def test_rows_that_are_kept_are_as_many_as_placeholders(toy, ask, images):
    (answer,) = toy.ask([ask("what shape is red?", images[6], rate=0)])
    token = toy.model.config.image_token_index
    assert answer.prompt_ids.count(token) == 152
    assert toy.model.family.target.endswith(NAME)
