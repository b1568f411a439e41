"""The catch of one image out of what a worker prunes."""

from types import SimpleNamespace

import pytest
import torch

from era_vllm.layout import one_grid
from era_vllm.pipeline import prune
from era_vllm.plan import Plan
from era_vllm.policies import dpp, era
from era_vllm.steps.entropy import head_entropy, head_profile, unattended
from era_vllm.types import Signal, VisualTokens
from era_vllm.vllm_plugin import inspector
from era_vllm.vllm_plugin.fields import Planned
from era_vllm.vllm_plugin.inspector import Inspector, Watched
from era_vllm.vllm_plugin.reducer import PrunedItem, PrunedSegment


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    return VisualTokens(
        torch.randn(3, 12, 8, generator=generator),
        (3, 4),
        {
            Signal.ENCODER_ATTENTION: torch.rand(3, 4, 12, generator=generator),
            Signal.PIXEL_HASH: torch.tensor([11, 22, 33]),
        },
    )


def items(tokens, result):
    """Pictures of one segment each, as the reducer hands them on."""
    found = Plan(one_grid(3, 4, ()), (result.anchors.shape[1],))
    return [
        PrunedItem(
            Planned(found, name),
            [PrunedSegment(tokens, result, torch.zeros(0), row)],
            torch.zeros(0),
        )
        for row, name in enumerate(tokens.pixel_hash.tolist())
    ]


def test_the_watched_image_is_caught_and_no_other(tokens):
    result = prune(tokens, 4, era.Policy())
    catch = Inspector(era.Policy(), [])
    for image in (Watched(22, (4,)), Watched(33, (5,))):
        catch.watch(image, 60)
    catch(items(tokens, result))
    whole = catch.take(Watched(22, (4,)))
    (found,) = whole.segments
    assert whole.log_bias == found.log_bias
    assert found.grid == (3, 4)
    assert found.anchors == result.anchors[1].tolist()
    assert found.assignment == result.assignment[1].tolist()
    assert found.log_bias == result.log_bias[1].tolist()
    assert catch.take(Watched(22, (4,))) is None  # handed out once
    assert catch.take(Watched(33, (5,))) is None  # another number of anchors
    assert catch.take(Watched(11, (4,))) is None  # nobody watched


def test_entropy_is_the_policys_own_and_none_where_it_has_none(tokens):
    policy = era.Policy(saliency="softmax", temperature=0.5)
    caught = []
    for each in (policy, dpp.Policy()):
        catch = Inspector(each, [])
        catch.watch(Watched(11, (4,)), 60)
        catch(items(tokens, prune(tokens, 4, each)))
        caught.append(catch.take(Watched(11, (4,))).segments[0].entropy)
    profile = head_profile(tokens, "softmax", 0.5)
    assert caught[0] == head_entropy(profile, unattended(tokens, policy.mass_guard))[0].tolist()
    assert caught[1] is None


def test_watching_is_bounded_in_time_and_number(tokens, monkeypatch):
    now = 0.0
    monkeypatch.setattr(inspector, "monotonic", lambda: now)
    catch, result = Inspector(era.Policy(), []), prune(tokens, 4, era.Policy())
    catch.watch(Watched(11, (4,)), 10)
    now = 10.1
    catch(items(tokens, result))
    assert catch.take(Watched(11, (4,))) is None
    catch.watch(Watched(11, (4,)), 10)
    for other in range(100, 108):
        catch.watch(Watched(other, (4,)), 10)
    catch(items(tokens, result))
    assert catch.take(Watched(11, (4,))) is None


def test_it_listens_only_while_somebody_watches_and_lets_others_listen(tokens, monkeypatch):
    now = 0.0
    monkeypatch.setattr(inspector, "monotonic", lambda: now)

    def others(pruned):
        """Was there before, and stays."""

    listeners = [others]
    catch, result = Inspector(era.Policy(), listeners), prune(tokens, 4, era.Policy())
    assert listeners == [others]
    for image in (Watched(11, (4,)), Watched(22, (4,)), Watched(11, (4,))):
        catch.watch(image, 10)
        assert listeners == [others, catch]
    for listen in tuple(listeners):
        listen(items(tokens, result))
    assert catch.take(Watched(11, (4,))) is not None
    assert listeners == [others, catch]
    assert catch.take(Watched(22, (4,))) is not None
    assert listeners == [others]
    catch.watch(Watched(33, (4,)), 10)
    now = 10.1  # nobody came for it
    for listen in tuple(listeners):
        listen(items(tokens, result))
    assert listeners == [others]
    assert catch.take(Watched(33, (4,))) is None


def test_a_worker_keeps_other_listeners_and_its_own_inspector():
    from era_vllm.vllm_plugin.worker import EraWorker

    heard = []
    model = SimpleNamespace(policy=era.Policy(), reducer=SimpleNamespace(listeners=[heard.append]))
    worker = EraWorker()
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    worker.era_watch(11, [4], 60)
    first = worker.era_inspector
    model.reducer.listeners.append(len)  # comes while it watches
    worker.era_watch(22, [4], 60)
    assert worker.era_inspector is first and model.reducer.listeners == [heard.append, first, len]
    for pixel_hash in (11, 22):
        worker.era_take(pixel_hash, [4], None)
    assert model.reducer.listeners == [heard.append, len]
    worker.era_watch(11, [4], 60)
    assert model.reducer.listeners == [heard.append, len, first]
