"""Positions with M-RoPE: carried ones and anchors' offsets are vLLM's own of the unpruned prompt.

Over random prompts of text, pictures and videos, without an engine: vLLM's class is asked for the
positions of every token unpruned; ours, of those that stay, have to be the same numbers, and the
text's too.
"""

import random
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from era_vllm.config import EraConfig
from era_vllm.plan import Plan, plan
from era_vllm.vllm_plugin.fields import SHAPE, field
from era_vllm.vllm_plugin.layouts import Layouts
from tests.contracts.test_adapters import CASES, adapter

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
STOCK = {
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
}
TEXT = 7


@pytest.mark.parametrize("name", STOCK)
def test_what_stays_stands_where_vllm_puts_it_unpruned(name: str) -> None:
    from era_vllm.vllm_plugin.model_mixin import PrunedModelMixin

    rng, own, config = random.Random(name), adapter(name), CASES[name].hf_config()
    theirs = getattr(import_module(f"vllm.model_executor.models.{STOCK[name]}"), name)
    stock = SimpleNamespace(config=config)
    stock.iter_mm_grid_thw = lambda features: theirs.iter_mm_grid_thw(stock, features)
    stock._get_mrope_input_positions = getattr(theirs, "_get_mrope_input_positions", None)
    ours = SimpleNamespace(layouts=Layouts(own, config, EraConfig()))
    videos = ahead = 0
    for _ in range(100):
        full, pruned = _Prompt(config, name), _Prompt(config, name)
        kept: list[torch.Tensor] = []
        offsets: list[torch.Tensor] = []
        for _ in range(rng.randrange(1, 4)):
            text = rng.randrange(0, 9)
            for prompt in (full, pruned):
                prompt.say(text)
            modality = rng.choice(["image", "video"])
            videos += modality == "video"
            seconds = rng.choice([0.3, 0.5, 1.0, 2.0, 1 / 3])
            shape = _shape(config, own, modality, seconds, rng)
            one = plan(
                own.layout(config, modality, shape), rng.choice([0.0, 0.5, 0.9]), EraConfig()
            )
            places = _stay(one, rng)
            full.add(modality, one, one.layout.run_lengths, seconds)
            pruned.add(modality, one, one.kept, seconds)
            kept.append(places)
            offsets.append(one.layout.position_offsets[places])
        text = rng.randrange(1, 9)
        for prompt in (full, pruned):
            prompt.say(text)
        expected, delta = theirs.get_mrope_input_positions(stock, full.ids, full.features)
        carried, more = PrunedModelMixin.get_mrope_input_positions(
            ours, pruned.ids, pruned.features
        )
        carried = carried.clone()
        carried[:, torch.tensor(pruned.visual)] += torch.cat(offsets).T
        visual = torch.tensor(full.visual)
        stays = visual.clone()
        stays[visual] = torch.cat(
            [torch.zeros(n, dtype=torch.bool).index_fill(0, at, True) for n, at in _of(full, kept)]
        )
        assert torch.equal(carried, expected[:, stays | ~visual])
        assert more == int(expected[:, -1].max()) + 1 - len(pruned.ids)
        assert int(expected.max()) + 1 == len(full.ids) + delta
        ahead += more > 0
    assert videos > 50 and ahead > 10


class _Prompt:
    """Token ids, vLLM's features, and which tokens are visual."""

    def __init__(self, config: Any, name: str) -> None:
        self.config, self.between = config, name.startswith("Qwen3")
        self.ids: list[int] = []
        self.visual: list[bool] = []
        self.features: list[Any] = []
        self.lengths: list[int] = []

    def say(self, tokens: int) -> None:
        self.ids += [TEXT] * tokens
        self.visual += [False] * tokens

    def add(self, modality: str, one: Plan, counts: Any, seconds: float) -> None:
        config, layout = self.config, one.layout
        start = len(self.ids)
        for number, count in enumerate(counts):
            if self.between and modality == "video":
                if number:
                    self.say(3)  # a timestamp
                self._mark(config.vision_start_token_id)
            self.ids += [getattr(config, f"{modality}_token_id")] * count
            self.visual += [True] * count
            if self.between and modality == "video":
                self._mark(config.vision_end_token_id)
        from vllm.multimodal.inputs import PlaceholderRange

        marks = torch.tensor(self.visual[start:])
        rows, columns, *times = layout.shape
        data: dict[str, Any] = {
            f"{modality}_grid_thw": SimpleNamespace(
                data=torch.tensor([len(times), rows * 2, columns * 2])
            ),
            field(SHAPE, modality): SimpleNamespace(data=torch.tensor(layout.shape)),
            "second_per_grid_ts": SimpleNamespace(data=torch.tensor(seconds)),
        }
        if not hasattr(config.vision_config, "tokens_per_second"):
            del data["second_per_grid_ts"]
        position = PlaceholderRange(offset=start, length=len(marks), is_embed=marks)
        self.features.append(SimpleNamespace(data=data, modality=modality, mm_position=position))
        self.lengths.append(int(marks.sum()))

    def _mark(self, token: int) -> None:
        self.ids.append(token)
        self.visual.append(False)


def _shape(config: Any, own: Any, modality: str, seconds: float, rng: random.Random) -> Any:
    rows, columns = rng.randrange(1, 12), rng.randrange(1, 12)
    if modality == "image":
        return (rows, columns, 0)
    frames = rng.randrange(1, 7)
    step = torch.tensor(seconds).item() * getattr(config.vision_config, "tokens_per_second", 0)
    return (rows, columns, *(int(f * step) if step else f for f in range(frames)))


def _stay(one: Plan, rng: random.Random) -> torch.Tensor:
    """Return places that could be anchors, ascending."""
    found = []
    for segment, count in zip(one.layout.segments, one.num_anchors, strict=True):
        found += sorted(rng.sample(segment.places.tolist(), count))
    return torch.tensor(found)


def _of(prompt: _Prompt, kept: list[torch.Tensor]) -> Any:
    return zip(prompt.lengths, kept, strict=True)
