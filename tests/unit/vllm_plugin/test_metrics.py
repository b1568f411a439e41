"""What a worker counts about its reducer."""

import pytest
import torch

from era_vllm.types import DEGENERATE_KINDS
from era_vllm.vllm_plugin import metrics
from era_vllm.vllm_plugin.metrics import BUCKETS_S, ReducerMetrics


def test_a_pass_falls_into_the_bucket_that_holds_its_duration(monkeypatch):
    now = iter([0.0, 0.001, 10.0, 10.0011, 20.0, 29.0])  # the first is exactly a bound
    monkeypatch.setattr(metrics, "perf_counter", lambda: next(now))
    counts = ReducerMetrics()
    for images in (1, 3, 2):
        with counts.timed(images, torch.device("cpu")):
            pass
    counted = counts.counted(torch.arange(DEGENERATE_KINDS))
    expected = [0] * (len(BUCKETS_S) + 1)
    for bucket in (BUCKETS_S.index(0.001), BUCKETS_S.index(0.0025), len(BUCKETS_S)):
        expected[bucket] += 1
    assert counted["passes"] == expected
    assert counted["seconds"] == pytest.approx(9.0021)
    assert counted["images"] == 6
    assert counted["degenerate"] == {
        "non_finite_embeds": 0,
        "non_finite_attention": 1,
        "no_attention": 2,
        "too_few_tokens": 3,
    }


def test_counts_handed_out_are_not_changed_later():
    counts = ReducerMetrics()
    before = counts.counted(torch.zeros(DEGENERATE_KINDS))
    with counts.timed(1, torch.device("cpu")):
        pass
    assert sum(before["passes"]) == before["images"] == 0
