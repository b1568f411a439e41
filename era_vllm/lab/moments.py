"""What no engine can be asked about the small Qwen3-VL: its tasks, pruned in other ways.

    python -m era_vllm.lab.moments maps --count 60
    python -m era_vllm.lab.moments frames --count 150

*maps*: a token of Qwen3-VL comes with a map for each of the language model's first layers
(DeepStack). What stands for a cluster gets them *merged* with the weights of its embedding (what
era_vllm does), the *anchor's own*, or *none*; and merged but *without bias*.

*frames*: ``--era-frames-per-segment`` joins frames where no text stands between them. No family of
that kind has a trained model here, so this one's frames are joined before they are pruned and put
back into their runs afterwards, each anchor in its own frame at its own place: a frame that changes
little may keep less than its neighbour. (An engine must know each run's length before it has seen
the video.)

Policy ``dpp``. Plain transformers; tokens keep the positions that they have unpruned.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT_QWEN3_VL
from era_vllm.lab.asking import Answer
from era_vllm.lab.oracle import LanguageOracle, Segment
from era_vllm.lab.scores import Counts, accuracy, count, difference
from era_vllm.lab.screen import bar
from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.film import Item
from era_vllm.lab.synth.tasks import Kind, Task, draw_tasks
from era_vllm.lab.train import words
from era_vllm.lab.train.packing import pack
from era_vllm.lab.train.qwen3_vl import FORM, item_patches
from era_vllm.pipeline import prune
from era_vllm.policies import make_policy
from era_vllm.types import VisualTokens


@dataclass(frozen=True, slots=True)
class Way:
    """How moments are pruned: a picture, or two frames of a video, as Qwen3-VL reads them."""

    name: str
    joined: int = 1
    """Moments that are pruned together."""
    maps: Literal["merged", "anchor's own", "none"] = "merged"
    bias: bool = True


@dataclass(frozen=True, slots=True)
class Experiment:
    """Ways that are compared, each with the first."""

    head: str
    against: str
    kinds: tuple[Kind, ...]
    count: int
    """Tasks of each kind."""
    rates: tuple[float, ...]
    ways: tuple[Way, ...]


EXPERIMENTS: Final = {
    "maps": Experiment(
        head="maps",
        against="merged",
        kinds=("picture", "several", "film"),
        count=60,
        rates=(0.5, 0.778, 0.889, 0.944),
        ways=(
            Way("merged"),
            Way("anchor's own", maps="anchor's own"),
            Way("none", maps="none"),
            Way("merged, without bias", bias=False),
        ),
    ),
    "frames": Experiment(
        head="frames together",
        against="one by one",
        kinds=("film",),
        count=150,
        rates=(0.778, 0.889, 0.944),
        ways=(Way("1"), Way("2", joined=2), Way("all", joined=4)),
    ),
}


class TaskOracle(LanguageOracle):
    """The shipped Qwen3-VL in plain transformers, asked with tokens that a caller pruned."""

    def __init__(self) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(
            CHECKPOINT_QWEN3_VL, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.dtype = torch.float32
        self._tokenizer = words.tokenizer()
        self._places = torch.empty(3, 0, dtype=torch.int64)

    @property
    def visual_tokens(self) -> list[int]:
        """The marks of a picture's token and of a video's."""
        return [words.IMAGE, words.VIDEO]

    def moment_rows(self, item: Item) -> Float[Tensor, "t n c"]:
        """Return each moment's tokens: main output, and behind it the feature maps."""
        pixels, grid = item_patches(item)
        seen = self.model.model.visual(pixels, grid_thw=grid, return_dict=True)
        rows = torch.cat([seen.pooler_output, *seen.deepstack_features], -1)
        return rows.unflatten(0, (int(grid[0, 0]), -1))

    def position_ids(self, *_: object) -> Int[Tensor, "3 t"]:
        """Return those of the tokens that are left, as they were unpruned."""
        return self._places

    def answer(self, task: Task, question: int, moments: Sequence[Segment]) -> Answer:
        """Answer one question greedily, all words at once as they should be."""
        asked = Task(task.kind, task.items, task.questions[question : question + 1])
        row = pack(asked, FORM, self._tokenizer, random.Random(0), extra=0)
        visual = np.flatnonzero(np.isin(row.ids, self.visual_tokens))
        left = np.ones(len(row.ids), bool)
        left[visual] = False
        starts = np.cumsum([0, *(moment.n for moment in moments)])
        for start, moment in zip(starts, moments, strict=False):
            left[visual[start + moment.anchors.numpy()]] = True
        self._places = torch.from_numpy(row.positions[:, left])
        first, end = row.spans[0]
        scores = self.log_probs(row.ids[left].tolist(), moments, end - first)
        right = (scores.argmax(-1).numpy() == row.targets[first:end]).all()
        kept = sum(len(moment.anchors) for moment in moments)
        return Answer(asked.questions[0].answer if right else "", kept)


def reduced(
    rows: Float[Tensor, "t n c"], grid: tuple[int, int], width: int, way: Way, rate: float
) -> list[Segment]:
    """Prune so many moments at a time; return what stands in each one's run, with its maps.

    Args:
        rows: Of ``TaskOracle.moment_rows``.
        width: Of the main output.
    """
    config, found = EraConfig(policy="dpp", max_pruning_rate=0.99), list[Segment]()
    for part in rows.split(way.joined):
        moments, n = part.shape[:2]
        flat = part.flatten(0, 1)
        given = flat[None, :, :width], (moments * grid[0], grid[1]), {}, flat[None, :, width:]
        kept = moments * config.num_anchors(n, rate)
        pruned = prune(VisualTokens(*given), kept, make_policy(config))
        assert pruned.riders is not None
        anchors, maps = pruned.anchors[0], pruned.riders[0]
        if way.maps != "merged":
            maps = flat[anchors, width:] if way.maps == "anchor's own" else torch.zeros_like(maps)
        embeds, bias = torch.cat([pruned.embeds[0], maps], -1), pruned.log_bias[0] * way.bias
        for moment in range(moments):
            own = anchors // n == moment
            found.append(Segment(embeds[own], bias[own], anchors[own] - moment * n, n))
    return found


@torch.inference_mode()
def measure(
    oracle: TaskOracle, tasks: Sequence[Task], experiment: Experiment
) -> dict[tuple[float, Way], Counts]:
    """Return the counts of each rate and way; at rate 0, unpruned, of the first way alone."""
    width = oracle.model.config.get_text_config().hidden_size
    cells = [(0.0, experiment.ways[0])]
    cells += [(rate, way) for rate in experiment.rates for way in experiment.ways]
    answers: dict[tuple[float, Way], list[list[Answer]]] = {cell: [] for cell in cells}
    with bar(len(tasks), "asking", "task") as shown:
        for task in tasks:
            seen = [
                (oracle.moment_rows(item), (frame.height // FORM.side, frame.width // FORM.side))
                for item in task.items
                for frame in item.frames[:1]
            ]
            for rate, way in cells:
                moments = [
                    segment
                    for rows, grid in seen
                    for segment in reduced(rows, grid, width, way, rate)
                ]
                numbers = range(len(task.questions))
                answers[rate, way].append([oracle.answer(task, at, moments) for at in numbers])
            shown.update()
    return {cell: count(tasks, given) for cell, given in answers.items()}


def table(counts: dict[tuple[float, Way], Counts], experiment: Experiment) -> str:
    """Return Markdown: each cell, and its difference from the first way at the same rate."""
    plain = experiment.ways[0]
    lines = [
        f"| rate | {experiment.head} | right % | against {experiment.against} |",
        "|---" * 4 + "|",
    ]
    for (rate, way), found in counts.items():
        right, gain = accuracy(found), difference(found, counts[rate, plain])
        assert right is not None and gain is not None
        said = "-" if way is plain else gain.text("+.1f")
        name = way.name if rate else "unpruned"
        lines.append(f"| {rate:g} | {name} | {right.text()} | {said} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the shipped Qwen3-VL."""
    parser = argparse.ArgumentParser(prog="python -m era_vllm.lab.moments", allow_abbrev=False)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--count", type=int, help="tasks of each kind (default 60, or 150 videos)")
    parser.add_argument("--seed", type=int, default=777)
    arguments = parser.parse_args(argv)
    experiment = EXPERIMENTS[arguments.experiment]
    number = experiment.count if arguments.count is None else arguments.count
    tasks = draw_tasks(experiment.kinds, arguments.seed, number, load_material(split="test"))
    print(table(measure(TaskOracle(), tasks, experiment), experiment))


if __name__ == "__main__":
    main()
