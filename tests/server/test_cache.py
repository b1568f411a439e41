"""Every cache on, over HTTP: what is encoded again, what is found, and that answers stay right."""

import math

import pytest

from tests.server.asking import N, chat, fresh, picture, rates, settled
from tests.server.conftest import LIMITS, SERVE, started

ENCODED, HITS, PREFIX = (
    "era:reduced_images_total",
    "vllm:mm_cache_hits_total",
    "vllm:prefix_cache_hits_total",
)
TOLERANCE = 0.1
"""Of log-probabilities in bf16: a prefix that is found was computed in another batch."""


@pytest.fixture(scope="module")
def uncached(tmp_path_factory):
    """The same server without a cache of any kind."""
    off = ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    commands = {"uncached": ([*SERVE, "serve", *LIMITS, *off], {})}
    with started(tmp_path_factory.mktemp("uncached"), commands) as (server,):
        yield server


A, B, C = (fresh(sample, 1000 + sample) for sample in (0, 1, 2))
OFF, LIGHT, STRONG = "high", {"era": {"level": "light"}}, "low"
OTHER = {"text": "how many shapes?"}
STEPS = {  # pictures and options -> tokens of each, pictures encoded, found by the processor
    "A off, B strong": ([picture(A, OFF), picture(B, STRONG)], {}, (N, 16), 2, 0),
    "B strong, A off": ([picture(B, STRONG), picture(A, OFF)], {}, (16, N), 0, 2),
    "A off, C strong": ([picture(A, OFF), picture(C, STRONG)], {}, (N, 16), 1, 1),
    "another question": ([picture(A, OFF), picture(B, STRONG)], OTHER, (N, 16), 0, 2),
    "B strong by rate": ([picture(B)], {"era": {"pruning_rate": 0.889}}, (16,), 0, 1),
    "C strong by its part": ([picture(C, OFF, era={"level": "strong"})], LIGHT, (16,), 0, 1),
    "A off by level": ([picture(A)], {"era": {"level": "off"}}, (N,), 0, 1),
    "A light": ([picture(A)], LIGHT, (72,), 1, 0),
    "A light, twice": ([picture(A), picture(A)], LIGHT, (72, 72), 0, 2),
    "B by default": ([picture(B)], {}, (32,), 1, 0),
    "B medium by level": ([picture(B)], {"era": {"level": "medium"}}, (32,), 0, 1),
}


@pytest.fixture(scope="module")
def answers(servers):
    """Every step, one after another: answer and figures."""
    return _every_step(servers[0])


@pytest.fixture(scope="module")
def plain_answers(uncached):
    """The same of a server without caches."""
    return _every_step(uncached)


def _every_step(server):
    found, last = {}, settled(server, ENCODED, HITS, PREFIX)
    for step, (pictures, options, *_) in STEPS.items():
        answer = chat(server, *pictures, logprobs=True, top_logprobs=10, **options)
        before, last = last, settled(server, ENCODED, HITS, PREFIX)
        found[step] = answer, {name: last[name] - before[name] for name in before}
    return found


@pytest.mark.parametrize("step", STEPS)
def test_a_picture_is_encoded_once_a_rate_whatever_stands_beside_it(answers, step):
    _, _, tokens, encoded, hits = STEPS[step]
    answer, counted = answers[step]
    print(f"{step}: encoded {counted[ENCODED]:.0f}, found {counted[HITS]:.0f}")
    assert [kept for *_, kept in rates(answer)] == list(tokens)
    assert (counted[ENCODED], counted[HITS]) == (encoded, hits)
    if step == "another question":
        assert counted[PREFIX] >= N // 2, "whole blocks of the first picture"


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_answers_are_those_of_a_server_without_caches(answers, plain_answers, step):
    (answer, _), (plain, uncounted) = answers[step], plain_answers[step]
    tokens = STEPS[step][2]
    distinct = 1 if "twice" in step else len(tokens)
    assert distinct <= uncounted[ENCODED] <= len(tokens)
    assert uncounted[HITS] == uncounted[PREFIX] == 0
    assert answer["era"] == plain["era"]
    assert answer["usage"] == plain["usage"]
    ours, theirs = (one["choices"][0] for one in (answer, plain))
    assert ours["message"]["content"] == theirs["message"]["content"]
    for one, other in zip(ours["logprobs"]["content"], theirs["logprobs"]["content"], strict=True):
        assert one["token"] == other["token"]
        expected = {top["token"]: top["logprob"] for top in other["top_logprobs"]}
        for top in one["top_logprobs"][:5]:
            assert math.isclose(top["logprob"], expected[top["token"]], abs_tol=TOLERANCE)


def test_answers_tell_one_step_from_another(answers):
    """Or the comparison above could not see a wrong picture."""
    tops = {step: answer["choices"][0]["logprobs"] for step, (answer, _) in answers.items()}
    same = {"B strong by rate", "B by default", "A light"}
    assert len({str(tops[step]) for step in same}) == len(same)
