"""What merging DeepStack's maps is worth in answers, and the bias: the small Qwen3-VL's tasks.

    python -m era_vllm.lab.deepstack --count 60

A token of Qwen3-VL comes with a map for each of the language model's first layers. What stands for
a cluster gets them *merged* with the weights of its embedding (what era_vllm does), the *anchor's
own*, or *none*; and merged but *without bias*. Policy ``dpp``; a picture, or a moment of a video,
is pruned alone. Plain transformers (``task_oracle.py``), as an engine offers no such choice.
"""

import argparse
from collections.abc import Sequence
from typing import Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from era_vllm.config import EraConfig
from era_vllm.lab.asking import Answer
from era_vllm.lab.oracle import Segment
from era_vllm.lab.scores import Counts, accuracy, count, difference
from era_vllm.lab.screen import bar
from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import Kind, Task, draw_task
from era_vllm.lab.task_oracle import GRID_STEP, TaskOracle
from era_vllm.pipeline import prune
from era_vllm.policies import make_policy
from era_vllm.types import VisualTokens

Maps = Literal["merged", "anchor's own", "none", "merged, without bias"]
MAPS: Final[tuple[Maps, ...]] = ("merged", "anchor's own", "none", "merged, without bias")
RATES: Final = (0.5, 0.778, 0.889, 0.944)
_KINDS: Final[tuple[Kind, ...]] = ("picture", "several", "film")


def reduced(
    rows: Float[Tensor, "t n c"], grid: tuple[int, int], width: int, maps: Maps, rate: float
) -> list[Segment]:
    """Prune each moment; give what is left its maps."""
    config = EraConfig(policy="dpp", max_pruning_rate=0.99)
    tokens = VisualTokens(rows[..., :width], grid, {}, rows[..., width:])
    pruned = prune(tokens, config.num_anchors(tokens.n, rate), make_policy(config))
    assert pruned.riders is not None and tokens.riders is not None
    riders = pruned.riders
    if maps == "anchor's own":
        at = pruned.anchors[..., None].expand(-1, -1, riders.shape[-1])
        riders = tokens.riders.gather(1, at)
    elif maps == "none":
        riders = torch.zeros_like(riders)
    embeds = torch.cat([pruned.embeds, riders], -1)
    return [
        Segment(embeds[at], pruned.log_bias[at], pruned.anchors[at], tokens.n)
        for at in range(len(embeds))
    ]


@torch.inference_mode()
def measure(oracle: TaskOracle, tasks: Sequence[Task]) -> dict[tuple[float, Maps], Counts]:
    """Return the counts of each rate and choice; (0, "merged") is unpruned."""
    width = oracle.model.config.get_text_config().hidden_size
    cells = [(0.0, MAPS[0]), *((rate, maps) for rate in RATES for maps in MAPS)]
    answers: dict[tuple[float, Maps], list[list[Answer]]] = {cell: [] for cell in cells}
    with bar(len(tasks), "asking", "task") as shown:
        for task in tasks:
            grids = [
                (item.frames[0].height // GRID_STEP, item.frames[0].width // GRID_STEP)
                for item in task.items
            ]
            rows = [oracle.moment_rows(item) for item in task.items]
            for rate, maps in cells:
                moments = [
                    segment
                    for of_item, grid in zip(rows, grids, strict=True)
                    for segment in reduced(of_item, grid, width, maps, rate)
                ]
                bias = maps != "merged, without bias"
                answers[rate, maps].append(
                    [
                        oracle.answer(task, at, moments, bias=bias)
                        for at in range(len(task.questions))
                    ]
                )
            shown.update()
    return {cell: count(tasks, given) for cell, given in answers.items()}


def table(counts: dict[tuple[float, Maps], Counts]) -> str:
    """Return Markdown: each cell, and its difference from merged maps at the same rate."""
    lines = ["| rate | maps | right % | against merged |", "|---" * 4 + "|"]
    for (rate, maps), found in counts.items():
        right, other = accuracy(found), difference(found, counts[rate, MAPS[0]])
        assert right is not None and other is not None
        shown = f"{100 * right.value:.1f} ({100 * right.low:.1f} to {100 * right.high:.1f})"
        gain = f"{100 * other.value:+.1f} ({100 * other.low:+.1f} to {100 * other.high:+.1f})"
        name = maps if rate else "unpruned"
        lines.append(f"| {rate:g} | {name} | {shown} | {'-' if maps == MAPS[0] else gain} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the shipped Qwen3-VL."""
    parser = argparse.ArgumentParser(prog="python -m era_vllm.lab.deepstack", allow_abbrev=False)
    parser.add_argument("--count", type=int, default=60, help="tasks of each kind (default 60)")
    parser.add_argument("--seed", type=int, default=777)
    arguments = parser.parse_args(argv)
    material = load_material(split="test")
    tasks = [
        draw_task(kind, arguments.seed, at, material)
        for kind in _KINDS
        for at in range(arguments.count)
    ]
    print(table(measure(TaskOracle(), [task for task in tasks if task.questions])))


if __name__ == "__main__":
    main()
