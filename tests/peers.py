"""Each peer's policy beside its oracle in ``oracle_peers``, on tokens of one segment."""

from collections.abc import Callable

from era_vllm.contracts import PruningPolicy
from era_vllm.policies import (
    cdpruner,
    divprune,
    dpp,
    entropyprune,
    holov,
    mfpruner,
    prumerge,
    visionzip,
    vispruner,
)
from era_vllm.types import Signal, VisualTokens
from tests import oracle, oracle_peers

Array = oracle.Array
Chosen = Callable[[VisualTokens, int], oracle.Selection]


def numbers(tokens: VisualTokens, signal: Signal | None = None) -> Array:
    """Return embeddings or a signal of the only segment, float64."""
    value = tokens.embeds if signal is None else tokens.signals[signal]
    return value[0].double().numpy()


def received(tokens: VisualTokens) -> Array:
    return numbers(tokens, Signal.CLASS_ATTENTION)


def queries(tokens: VisualTokens) -> Array:
    return numbers(tokens, Signal.LANGUAGE_QUERIES)


def by_entropy(trace_norm: bool) -> Chosen:
    return lambda tokens, count: oracle_peers.most_entropic(
        queries(tokens), count, trace_norm=trace_norm
    )


def by_rounds(important: float) -> Chosen:
    return lambda tokens, count: oracle_peers.distinct(
        numbers(tokens), received(tokens), count, important
    )


def by_crops(crops: int, beta: float, by_score: bool) -> Chosen:
    return lambda tokens, count: oracle_peers.budgeted(
        numbers(tokens), received(tokens), count, crops, beta, by_score=by_score
    )


def asked(tokens: VisualTokens) -> Array:
    return numbers(tokens, Signal.RELEVANCE)[0]


def conditioned(theta: float) -> Chosen:
    return lambda tokens, count: oracle_peers.conditioned(
        numbers(tokens), asked(tokens), count, theta
    )


def relevant(beta: float) -> Chosen:
    return lambda tokens, count: oracle_peers.relevant(
        numbers(tokens), asked(tokens), count, 0.1, beta
    )


CASES: dict[str, tuple[PruningPolicy, Chosen]] = {
    "mfpruner": (
        mfpruner.Policy(),
        lambda tokens, count: oracle_peers.voted(numbers(tokens), received(tokens), count),
    ),
    "mfpruner, relevance": (
        mfpruner.Policy(relevance=True),
        lambda tokens, count: oracle_peers.voted(
            numbers(tokens), received(tokens), count, asked(tokens)
        ),
    ),
    "cdpruner": (cdpruner.Policy(), conditioned(1.0)),
    "cdpruner, 0.5": (cdpruner.Policy(theta=0.5), conditioned(0.5)),
    "dpp, relevance": (dpp.Policy(relevance_weight=0.25), relevant(0.25)),
    "entropyprune": (entropyprune.Policy(), by_entropy(True)),
    "entropyprune, no norm": (entropyprune.Policy(trace_norm=False), by_entropy(False)),
    "divprune": (
        divprune.Policy(),
        lambda tokens, count: oracle_peers.max_min(numbers(tokens), count),
    ),
    "vispruner": (vispruner.Policy(), by_rounds(0.5)),
    "vispruner, 0.2": (vispruner.Policy(important=0.2), by_rounds(0.2)),
    "visionzip": (
        visionzip.Policy(),
        lambda tokens, count: oracle_peers.dominant_and_contextual(
            received(tokens), count, 0.84375
        ),
    ),
    "prumerge": (
        prumerge.Policy(),
        lambda tokens, count: oracle_peers.salient_and_spaced(received(tokens), count, 0.25),
    ),
    "holov": (holov.Policy(), by_crops(16, 0.09, by_score=False)),
    "holov, 5 crops": (
        holov.Policy(crops=5, variance=2.0, within="score"),
        by_crops(5, 2.0, by_score=True),
    ),
}
"""The first of each name has the defaults."""
ASKING: dict[str, dict[str, object]] = {
    "cdpruner": {"policy": "cdpruner"},
    "mfpruner": {"policy": "mfpruner", "policy_options": {"relevance": True}},
    "dpp": {"policy": "dpp", "policy_options": {"relevance_weight": 0.25}},
    "era": {"policy": "era", "policy_options": {"relevance_weight": 0.25}},
}
"""Settings of what reads the question, beside ``EraConfig.question_aware``."""
PEERS = ("divprune", "entropyprune", "holov", "mfpruner", "prumerge", "visionzip", "vispruner")
