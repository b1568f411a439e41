"""vLLM's own pruning of videos (efficient video sampling) beside ours, where a prefix is found."""

import pytest

from tests.engine import test_tiled as tiled
from tests.engine.conftest import CONTROL_FACTOR, STEPS, TOLERANCE
from tests.engine.families import qwen
from tests.engine.families.case import CLIPS, TEXT, about

case = pytest.fixture(scope="module")(lambda: qwen.QWEN2_5)
folder, start = tiled.folder, tiled.start


def with_its_pruning(live):
    """Switch vLLM's own pruning on, which its CPU runner leaves off.

    Upstream: vllm/v1/worker/gpu_model_runner.py:5156 (0.32.0), which that one does not reach.
    """
    multimodal = live.core.vllm_config.model_config.multimodal_config
    live.runner.is_multimodal_pruning_enabled = multimodal.is_multimodal_pruning_enabled()
    return live


@pytest.mark.slow
@pytest.mark.situation("vLLM's own pruning of videos beside ours, prefix hit")
def test_a_prefix_hit_is_right_where_vllms_own_pruning_is_wrong(case, start, measured):
    """Efficient video sampling moves positions after the encoder; a hit does not see them."""
    film = ("video", CLIPS[1], 0.5)
    first, second = (
        about(case, f"{TEXT} {more}", film) for more in ("now", "then how many shapes?")
    )
    differences = {}
    for name, how in {
        "vLLM's": {"stock": True, "llm": {"video_pruning_rate": 0.5}},
        "ours": {"llm": {}},
    }.items():
        bare = [tiled._Bare(ask) if "stock" in how else ask for ask in (first, second)]
        cached = with_its_pruning(start(**how))
        cached.ask(bare[:1])
        (hit,) = cached.ask(bare[1:])
        assert hit.cached_tokens >= 16
        uncached = start(**{**how, "llm": {**how["llm"], "enable_prefix_caching": False}})
        (fresh,) = with_its_pruning(uncached).ask(bare[1:])
        assert hit.prompt_ids == fresh.prompt_ids
        steps = 1 if hit.token_ids != fresh.token_ids else STEPS
        difference = (hit.log_probs[:steps] - fresh.log_probs[:steps]).abs().max()
        differences[name] = float(difference)
    print(differences)
    measured(
        start().config,
        start().kernel,
        differences["ours"],
        differences["vLLM's"],
        TOLERANCE,
        case.name,
    )
    assert differences["ours"] < TOLERANCE < differences["vLLM's"] / CONTROL_FACTOR
