"""What the benchmarks measure with: rounds, stages, fits, goals, tables, inputs. Times nothing."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from era_vllm.bench import plots
from era_vllm.bench.clock import Samples, interleave, p90, power_law
from era_vllm.bench.first_token import table as demo_table
from era_vllm.bench.first_token import timings_of
from era_vllm.bench.inputs import image_prompt, noise_pictures, word_prompts
from era_vllm.bench.pruning_step import Size, random_tokens, reducer_cell
from era_vllm.bench.report import Goal, Report, percent, shown, table, times
from era_vllm.bench.setup import prefill_flops
from era_vllm.bench.stages import StageClock
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.dummy import FAMILIES, SIZES, make_dummy, size_of
from era_vllm.lab.dummy_qwen import feature_layers, rotary_sections
from era_vllm.policies import defaults, make_policy, policy_names
from era_vllm.types import OF_ENCODER

SAMPLES = Samples({"a": {"ttft": (1.0, 9.0, 4.0)}, "b": {"ttft": (2.0, 3.0, 2.0), "x": (1.0,)}})


def test_rounds_run_every_cell_and_rotate_the_order() -> None:
    calls: list[str] = []

    def cell(name: str) -> dict[str, float]:
        calls.append(name)
        return {"t": float(len(calls))}

    samples = interleave({"a": lambda: cell("a"), "b": lambda: cell("b")}, rounds=2, warm_ups=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert samples.of("a", "t") == [4.0, 5.0]  # the warm-up is not among them
    assert samples.of("b", "t") == [3.0, 6.0]


def test_ratios_are_taken_within_a_round() -> None:
    assert SAMPLES.ratio("a", "b", "ttft") == 2.0  # of .5, 3, 2; of the medians: 4 / 2
    assert SAMPLES.ratio("b", "a", "x", "ttft") == 1.0
    assert SAMPLES.median("a", "ttft") == 4.0
    assert SAMPLES.median("a", "x") is SAMPLES.p90("a", "x") is SAMPLES.ratio("a", "b", "x") is None


def test_p90_lies_between_neighbours() -> None:
    assert p90((5.0,)) == 5.0
    assert p90(tuple(float(i) for i in range(11))) == pytest.approx(9.0)
    assert SAMPLES.p90("a", "ttft") == pytest.approx(8.0)


def test_a_power_law_is_found_again() -> None:
    x = [16, 64, 256, 1000]
    law = power_law(x, [3e-6 * n**1.7 for n in x])
    assert law.exponent == pytest.approx(1.7)
    assert law.factor == pytest.approx(3e-6)
    assert law.r_squared == pytest.approx(1.0)
    assert law(100) == pytest.approx(3e-6 * 100**1.7)
    assert power_law(x, [2.0] * 4).exponent == pytest.approx(0.0, abs=1e-12)
    assert power_law([1, 2, 4], [1.0, 3.0, 1.5]).r_squared < 0.5


@pytest.mark.parametrize(("x", "y"), [([4, 4], [1, 2]), ([1, 2], [0, 1]), ([1, 2], [1, 2, 3])])
def test_what_has_no_power_law_is_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="two different x"):
        power_law(x, y)


@pytest.mark.parametrize(
    ("value", "sense", "met", "word"),
    [
        (2.0, "at least", True, "met "),
        (1.99, "at least", False, "MISSED"),
        (2.0, "at most", True, "met "),
        (2.01, "at most", False, "MISSED"),
        (None, "at most", None, "not measured"),
    ],
)
def test_goals_are_judged_plainly(value, sense, met, word) -> None:
    goal = Goal("TTFT", value, sense, 2.0)
    assert goal.met is met
    assert goal.as_dict()["met"] is met
    assert goal.line().startswith(word)
    assert f"{sense} 2x" in goal.line()


def test_a_report_is_json_with_its_origin() -> None:
    goals = [Goal("TTFT", 2.5, "at least", 2.0)]
    report = Report(SAMPLES, [table(["a"], [["1"]])], goals, {"kv": 3}, ("a word",))
    document = report.as_dict("serve", {"rounds": 3})
    assert json.loads(json.dumps(document)) == document
    assert set(document) == {
        *("bench", "schema", "commit", "date", "versions", "hardware", "command", "settings"),
        *("goals", "facts", "notes", "samples"),
    }
    figures = document["samples"]["a"]["ttft"]
    assert figures == {"median_s": 4.0, "p90_s": 8.0, "values_s": [1.0, 9.0, 4.0]}
    assert "met           TTFT: 2.5x, at least 2x" in report.text()
    assert report.text().endswith("note: a word")


def test_a_table_lines_up() -> None:
    text = table(
        ["name", "t"], [["a", shown(1.234)], ["bcdefg", shown(0.0123)], ["c", shown(None)]]
    )
    header, rule, *rows = text.splitlines()
    assert rule == "------  -------"
    assert [row.split()[0] for row in rows] == ["a", "bcdefg", "c"]
    assert {len(line) for line in (header, rule, *rows)} == {len(rule)}
    assert (times(0.5), times(None), percent(0.051), percent(None)) == ("0.500x", "-", "5.1%", "-")


class Sleeper(nn.Module):
    """A module that takes its time."""

    def forward(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


def test_stages_tell_modules_methods_and_hooks_apart() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = Sleeper()
            self.tower.register_forward_pre_hook(lambda *_: time.sleep(0.02))

        def encode(self) -> float:
            time.sleep(0.03)
            return self.tower(0.01)

    model, other, clock = Model(), Model(), StageClock()
    clock.watch_method("encoder", model, "encode")
    clock.watch("tower", model.tower)
    clock.watch_hooks("tap", model.tower)
    assert model.encode() == 0.01
    assert other.encode() == 0.01  # not hooked
    model.tower(0.0)
    spans = clock.take()
    assert {stage: len(found) for stage, found in spans.items()} == {
        "tap": 2,
        "tower": 2,
        "encoder": 1,
    }
    assert 0.02 <= spans["tap"][0] <= spans["tower"][0] - 0.01
    assert spans["tower"][0] <= spans["encoder"][0] - 0.03
    assert clock.take() == {}


def test_inputs_are_new_each_time_and_the_same_in_every_run() -> None:
    pictures, again = noise_pictures(8), noise_pictures(8)
    first, second = next(pictures), next(pictures)
    assert first.tobytes() != second.tobytes()
    assert first.tobytes() == next(again).tobytes()
    words = word_prompts(5)
    prompts = [next(words) for _ in range(3)]
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert {len(prompt) for prompt in prompts} == {5}
    assert "mm_processor_kwargs" not in image_prompt(first, None)
    assert image_prompt(first, 0.5)["mm_processor_kwargs"] == {"era": [0.5]}


@pytest.mark.parametrize("policy", policy_names())
def test_the_reducer_is_timed_with_what_a_policy_needs(policy: str) -> None:
    taken = reducer_cell(policy, Size(600, 8), 32, torch.bfloat16, "cpu")()
    read = make_policy(defaults(policy)).needs & OF_ENCODER
    parts = {"prune", "signal"} if read else {"prune"}
    assert set(taken) == {*parts, "reducer"}
    assert taken["reducer"] == pytest.approx(sum(taken[part] for part in parts))


def test_random_tokens_fill_their_grid() -> None:
    for n, grid in ((576, (24, 24)), (2880, (48, 60)), (7, (1, 7))):
        assert random_tokens(Size(n, 1), 16, torch.float32, "cpu").grid == grid
    assert [Size(n, 1).images for n in (128, 576, 2880, 16384)] == [1, 1, 5, 28]
    assert Size(576, 32, segments=5).images == 5
    assert random_tokens(Size(16, 4, segments=3), 8, torch.float32, "cpu").segments == 3


def test_the_demos_ratios_are_against_the_first_rate() -> None:
    samples = Samples({"0": {"ttft": (4.0, 2.0, 4.0)}, "0.5": {"ttft": (1.0, 1.0, 1.0)}})
    timings = timings_of(samples, {0.0: 587, 0.5: 299})
    assert [timing["ratio"] for timing in timings] == [1.0, 0.25]
    assert timings[1]["ratios"] == [0.25, 0.5, 0.25]
    assert timings[1]["seconds"] == (1.0, 1.0, 1.0)
    assert [timing["prompt_tokens"] for timing in timings] == [587, 299]
    line = demo_table(timings).splitlines()[2]
    assert re.fullmatch(r"0\.5 +299 +1\.00 s \(1\.00 - 1\.00\) +0\.25x", line)


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (the lab extra)")
    law = power_law([1, 2], [1.0, 2.0])
    parts = ["ttft", "x", "tower"]
    plots.bars(tmp_path / "bars.png", "t", SAMPLES, {"p": (["a", "b"], parts)})
    curves = {"n": {"era": ([1, 2], [1.0, 2.0], law), "dpp": ([1], [1.0], None)}}
    plots.growth(tmp_path / "growth.png", "t", {"era": {"576->64": 0.04}}, 0.05, curves)
    for name in ("bars.png", "growth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_dummy_model_has_the_shape_that_was_asked_for(tmp_path: Path) -> None:
    size = SIZES["tiny"]
    make_dummy(tmp_path, size)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["head_dim"] == size.hidden // size.heads
    assert config["vision_config"]["num_hidden_layers"] == size.tower_layers == 4
    assert round(SIZES["0.9b"].parameters / 1e9, 2) == 0.87
    assert round(SIZES["7b"].parameters / 1e9, 1) == 6.5
    assert (tmp_path / "tokenizer.json").read_text() == (CHECKPOINT / "tokenizer.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dummy_family_has_its_own_processor(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    make_dummy(tmp_path, SIZES["tiny"], family)
    known = FAMILIES[family]
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [known.architecture]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    (picture,) = (next(noise_pictures(*known.picture)),)
    assert picture.size == known.picture[::-1]
    ids = processor(images=[picture], text=f"USER: {known.mark} ASSISTANT:")["input_ids"]
    (ids,) = ids if isinstance(ids[0], list) else (ids,)
    assert ids.count(config.image_token_id) == known.tokens


def test_qwen3_vl_is_as_large_as_published(tmp_path: Path) -> None:
    """Of 2.1 B parameters 1.41 are in its layers, .31 embeddings, the rest the tower."""
    size = size_of("qwen3-vl-2b", "qwen3-vl")
    assert size.parameters == 28 * (2 * 2048 * (2048 + 1024) + 3 * 2048 * 6144)
    quarter = size_of("0.2b", "qwen3-vl")
    assert quarter.parameters * 4 == size.parameters and quarter.tower_layers == 6
    assert size_of("0.2b") == SIZES["0.2b"]
    make_dummy(tmp_path, size, "qwen3-vl")
    config = json.loads((tmp_path / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert (text["num_key_value_heads"], text["head_dim"]) == (8, 128)
    assert text["rope_parameters"]["mrope_section"] == [24, 20, 20]
    assert vision["deepstack_visual_indexes"] == [5, 11, 17]
    assert feature_layers(6, 7) == [1, 2, 4] and feature_layers(4, 2) == [0, 1]
    assert sum(rotary_sections(160)) == 80  # a bench's widened heads


@pytest.mark.parametrize("side", [64, 1024, 2048])
def test_a_picture_may_have_another_size(tmp_path: Path, side: int) -> None:
    transformers = pytest.importorskip("transformers")
    known = FAMILIES["qwen3-vl"].of_side(side)
    make_dummy(tmp_path, SIZES["tiny"], "qwen3-vl", known.tokens)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    picture = next(noise_pictures(*known.picture))
    (grid,) = processor.image_processor(images=[picture], return_tensors="pt")["image_grid_thw"]
    assert int(grid.prod()) == 4 * known.tokens == (side // 16) ** 2


def test_prefill_flops_of_grouped_heads() -> None:
    size, tokens = size_of("qwen3-vl-2b", "qwen3-vl"), 1050
    pairs = 2 * 28 * 16 * 128 * tokens**2
    assert prefill_flops(size, tokens) == pytest.approx(2 * 1.409e9 * tokens + pairs, rel=1e-3)


def test_prefill_flops_are_those_of_the_field() -> None:
    """LLaVA-1.5-7B: 6.5 B parameters in its layers, 64 tokens of text."""
    whole, kept = (prefill_flops(SIZES["7b"], count + 64) for count in (2880, 160))
    assert whole == pytest.approx(2 * 6.48e9 * 2944 + 2 * 32 * 4096 * 2944**2, rel=1e-2)
    assert 12 < whole / kept < 15
