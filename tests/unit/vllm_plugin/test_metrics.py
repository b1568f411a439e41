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
        with counts.timed(images, torch.arange(DEGENERATE_KINDS)):
            pass
    counted = counts.counted()
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
        "policy_output": 4,
    }


def test_counts_handed_out_are_not_changed_later():
    counts = ReducerMetrics()
    before, repaired = counts.counted(), torch.zeros(DEGENERATE_KINDS, dtype=torch.int64)
    with counts.timed(1, repaired):
        repaired += 1
    assert sum(before["passes"]) == before["images"] == sum(before["degenerate"].values()) == 0
    assert set(counts.counted()["degenerate"].values()) == {1}


class FakeEvent:
    """A GPU's event: past once the device is, and never to be waited for."""

    device_s = 0.0
    is_past = False

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        self.at = FakeEvent.device_s

    def query(self):
        assert self.at is not None
        return FakeEvent.is_past

    def elapsed_time(self, other):
        assert FakeEvent.is_past
        return 1e3 * (other.at - self.at)

    def synchronize(self):
        pytest.fail("waited for the device")


class FakeCounts:
    """Counts on a GPU: a copy to the host is there once the device is past it."""

    device = torch.device("cuda")

    def __init__(self):
        self.now = torch.zeros(DEGENERATE_KINDS, dtype=torch.int64)

    def to(self, where, *, non_blocking):
        assert where == "cpu" and non_blocking
        return FakeCopy(self.now.clone())

    def tolist(self):
        pytest.fail("waited for the device")


class FakeCopy:
    """What such a copy is until then: not to be read."""

    def __init__(self, values):
        self.values = values

    def tolist(self):
        assert FakeEvent.is_past, "read before it was there"
        return self.values.tolist()


@pytest.fixture
def gpu(monkeypatch):
    """A device of this kind without one: what is recorded on it, and whether it is past that."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "is_past", False)
    monkeypatch.setattr(FakeEvent, "device_s", 0.0)
    return FakeEvent


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_pass_that_raises_counts_with_its_time_and_no_image(monkeypatch, gpu, kind):
    gpu.is_past = True
    now = iter([0.0, 0.02, 1.0, 1.02])
    monkeypatch.setattr(metrics, "perf_counter", lambda: next(now))
    counts = ReducerMetrics()
    repaired = FakeCounts() if kind == "cuda" else torch.zeros(DEGENERATE_KINDS)
    for images, fault in ((3, "out of memory"), (2, None)):
        try:
            with counts.timed(images, repaired):
                gpu.device_s += 0.02
                if fault:
                    raise RuntimeError(fault)
        except RuntimeError as error:
            assert str(error) == fault
    counted = counts.counted()
    assert (counted["images"], sum(counted["passes"])) == (2, 2)
    assert counted["seconds"] == pytest.approx(0.04)


def test_nobody_waits_for_a_device(gpu):
    """Not a step and not a scrape: what the device is still at is told the next time."""
    counts, repaired = ReducerMetrics(), FakeCounts()
    with counts.timed(2, repaired):
        gpu.device_s += 0.03
        repaired.now[0] += 5
    early = counts.counted()
    assert (early["images"], sum(early["passes"]), early["seconds"]) == (2, 0, 0.0)
    assert set(early["degenerate"].values()) == {0}
    gpu.is_past = True
    late = counts.counted()
    assert (late["images"], sum(late["passes"])) == (2, 1)
    assert late["seconds"] == pytest.approx(0.03)
    assert late["degenerate"]["non_finite_embeds"] == 5
    assert counts.counted() == late
