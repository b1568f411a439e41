"""bf16 and fp8: pruned and unpruned, the engine is as close to float32 as stock vLLM's text.

The bar is measured beside it, on the same kernel: kernels round differently, and so do CPUs. Errors
are means over the decode steps of the largest difference of log-probabilities, averaged over six
requests.
"""

import math
from dataclasses import dataclass

import pytest

from era_vllm.policies import uniform


@dataclass(frozen=True, slots=True)
class Heavy(uniform.Policy):
    """Every fourth anchor stands for 500 tokens, more than an image has."""

    def log_bias(self, tokens, clusters):
        bias = uniform.Policy.log_bias(self, tokens, clusters)
        bias[:, ::4] = math.log(500)
        return bias


@pytest.mark.situation("bf16")
@pytest.mark.parametrize("store", ["key_columns", "value_column"])
def test_bf16_is_as_close_as_stock(as_close_as_stock, store):
    as_close_as_stock({"dtype": "bfloat16"}, bias_store=store)


@pytest.mark.situation("fp8 KV cache")
@pytest.mark.parametrize("policy", ["era", f"{__name__}:Heavy"])
@pytest.mark.parametrize("store", ["key_columns", "value_column"])
def test_fp8_cache_is_as_close_as_stock(needs_fp8, as_close_as_stock, store, policy):
    needs_fp8(store)
    llm = {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    as_close_as_stock(llm, bias_store=store, policy=policy)
