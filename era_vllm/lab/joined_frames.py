"""What pruning frames of a video together costs or gains in answers: the small Qwen3-VL's videos.

    python -m era_vllm.lab.joined_frames --count 150

``--era-frames-per-segment`` joins frames where no text stands between them. No family of that kind
has a trained model here, so plain transformers is asked with the Qwen3-VL's tower and language
model, whose frames are joined before they are pruned and put back into their runs afterwards, each
anchor in its own frame at its own place: a frame that changes little may keep less than its
neighbour. (An engine cannot do that to Qwen3-VL, as it must know each run's length before it has
seen the video.) Policy ``dpp``, which needs no encoder attention; merged, with bias.
"""

import argparse
from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from era_vllm.config import EraConfig
from era_vllm.lab.asking import Answer
from era_vllm.lab.oracle import Segment
from era_vllm.lab.scores import Counts, accuracy, count, difference
from era_vllm.lab.screen import bar
from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import Task, draw_task
from era_vllm.lab.task_oracle import GRID_STEP, TaskOracle
from era_vllm.pipeline import prune
from era_vllm.policies import make_policy
from era_vllm.types import VisualTokens

JOINED: Final = (1, 2, 4)
"""Frames (of two of a file's, as Qwen3-VL reads them) that are pruned together; 4 = all."""
RATES: Final = (0.778, 0.889, 0.944)


def reduced(
    rows: Float[Tensor, "t n c"], grid: tuple[int, int], width: int, joined: int, rate: float
) -> list[Segment]:
    """Prune, so many frames at a time; return what stands in each frame's run."""
    config, found = EraConfig(policy="dpp", max_pruning_rate=0.99), list[Segment]()
    for part in rows.split(joined):
        frames, n = part.shape[:2]
        flat = part.flatten(0, 1)[None]
        tokens = VisualTokens(flat[..., :width], (frames * grid[0], grid[1]), {}, flat[..., width:])
        kept = frames * config.num_anchors(n, rate) if rate else frames * n
        pruned = prune(tokens, kept, make_policy(config))
        assert pruned.riders is not None
        embeds = torch.cat([pruned.embeds, pruned.riders], -1)[0]
        for frame in range(frames):
            own = pruned.anchors[0] // n == frame
            at = pruned.anchors[0][own] - frame * n
            found.append(Segment(embeds[own], pruned.log_bias[0][own], at, n))
    return found


@torch.inference_mode()
def measure(oracle: TaskOracle, tasks: Sequence[Task]) -> dict[tuple[float, int], Counts]:
    """Return the counts of each rate and number of frames together; (0, 1) is unpruned."""
    width = oracle.model.config.get_text_config().hidden_size
    cells = [(0.0, 1), *((rate, joined) for rate in RATES for joined in JOINED)]
    answers: dict[tuple[float, int], list[list[Answer]]] = {cell: [] for cell in cells}
    with bar(len(tasks), "asking", "video") as shown:
        for task in tasks:
            (item,) = task.items
            rows, frame = oracle.moment_rows(item), item.frames[0]
            grid = frame.height // GRID_STEP, frame.width // GRID_STEP
            for rate, joined in cells:
                segments = reduced(rows, grid, width, joined, rate)
                answers[rate, joined].append(
                    [oracle.answer(task, at, segments) for at in range(len(task.questions))]
                )
            shown.update()
    return {cell: count(tasks, given) for cell, given in answers.items()}


def table(counts: dict[tuple[float, int], Counts]) -> str:
    """Return Markdown: each cell, and its difference from frame by frame at the same rate."""
    lines = ["| rate | frames together | right % | against one by one |", "|---" * 4 + "|"]
    for (rate, joined), found in counts.items():
        right = accuracy(found)
        gain = None if joined == 1 else difference(found, counts[rate, 1])
        assert right is not None
        said = "-" if gain is None else gain.text("+.1f")
        name = "unpruned" if not rate else "all" if joined == JOINED[-1] else str(joined)
        lines.append(f"| {rate:g} | {name} | {right.text()} | {said} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the shipped Qwen3-VL."""
    name = "python -m era_vllm.lab.joined_frames"
    parser = argparse.ArgumentParser(prog=name, allow_abbrev=False)
    parser.add_argument("--count", type=int, default=150, help="videos (default 150)")
    parser.add_argument("--seed", type=int, default=777)
    arguments = parser.parse_args(argv)
    material = load_material(split="test")
    tasks = [draw_task("film", arguments.seed, at, material) for at in range(arguments.count)]
    print(table(measure(TaskOracle(), [task for task in tasks if task.questions])))


if __name__ == "__main__":
    main()
