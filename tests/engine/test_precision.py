"""bf16 and fp8: the engine is as close to float32 as plain transformers, or as its own text.

The oracle is fed the engine's own reduced embeddings. Errors are means over the decode steps of
the largest difference of log-probabilities, averaged over six requests.
"""

import math
from dataclasses import dataclass

import pytest

from era_vllm.lab.oracle import Segment
from era_vllm.policies import uniform
from tests.engine.conftest import QUESTIONS, mean_errors


@dataclass(frozen=True, slots=True)
class Heavy(uniform.Policy):
    """Every fourth anchor stands for 500 tokens, more than an image has."""

    def log_bias(self, tokens, clusters):
        bias = uniform.Policy.log_bias(self, tokens, clusters)
        bias[:, ::4] = math.log(500)
        return bias


@pytest.fixture
def errors(oracle, oracle_bf16):
    """Mean errors against float32: of the engine, of transformers in bf16, and without the bias."""

    def measure(live, requests, answers):
        rows = []
        for request, answer in zip(requests, answers, strict=True):
            segments = []
            for image in request.images:
                _, result, row = live.pruned[live._key(image, live.config.pruning_rate, oracle)]
                kept = result.embeds[row].float(), result.log_bias[row], result.anchors[row]
                segments.append(Segment(*kept, 144))
            rows.append(([*answer.prompt_ids, *answer.token_ids][:-1], segments, answer.log_probs))
        return mean_errors(oracle, oracle_bf16, rows, live.config)

    return measure


@pytest.mark.situation("bf16")
@pytest.mark.parametrize("store", ["key_columns", "value_column"])
def test_bf16_is_as_close_as_transformers(engine, setup, ask, images, errors, measured, store):
    live = engine(setup(bias_store=store, llm={"dtype": "bfloat16"}))
    requests = [ask(text, image) for text, image in zip(QUESTIONS, images, strict=False)]
    ours, theirs, without = errors(live, requests, live.ask(requests))
    print(f"bf16 {store}: engine {ours:.3f}, transformers {theirs:.3f}, no bias {without:.2f}")
    measured(live.config, ours, without, 1.25 * theirs)
    assert ours <= 1.25 * theirs
    assert without > 3 * 1.25 * theirs


@pytest.mark.situation("fp8 KV cache")
@pytest.mark.parametrize("policy", ["era", f"{__name__}:Heavy"])
@pytest.mark.parametrize("store", ["key_columns", "value_column"])
def test_fp8_cache_is_as_close_as_for_text(
    engine, setup, ask, images, errors, measured, store, policy
):
    llm = {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    live = engine(setup(bias_store=store, policy=policy, llm=llm))
    requests = [ask(text, image) for text, image in zip(QUESTIONS, images, strict=False)]
    ours, _, without = errors(live, requests, live.ask(requests))
    texts = [ask(text) for text in QUESTIONS]
    text, _, _ = errors(live, texts, live.ask(texts))
    print(f"fp8 {store} {policy}: {ours:.3f}, text alone {text:.3f}, no bias {without:.2f}")
    measured(live.config, ours, without, text)
    assert ours <= text
    assert without > 3 * text
