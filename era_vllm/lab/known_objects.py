"""What a selection reaches that knows where the things are: a bound for what one has to find out.

    python -m era_vllm.lab.known_objects --count 60

The policy ``dpp`` with a quality of a token of 1 where it shows something and ``BACKGROUND``
elsewhere (``train/labels.py``), so that background stays only where things leave room; and the same
where only things of the kind that is asked about are known: shapes, digits, the word, or the chart.
Pruned tokens are merged, biased and injected as always. Plain transformers, the sample model.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal

import torch
from jaxtyping import Float32
from PIL.Image import Image
from torch import Tensor

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.asking import Answer, Subject, TransformersAsker
from era_vllm.lab.blocks import prune_blocks
from era_vllm.lab.oracle import Oracle, Segment, segments_of
from era_vllm.lab.scores import accuracy, count
from era_vllm.lab.screen import bar
from era_vllm.lab.synth.assets import SHAPES, load_material
from era_vllm.lab.synth.questions import TaskFamily
from era_vllm.lab.synth.scene import Scene
from era_vllm.lab.synth.tasks import QUOTAS, Task, draw_tasks
from era_vllm.lab.train.labels import CHART, DIGIT, WORD, label
from era_vllm.types import Signal, VisualTokens

RATES: Final = (0.889, 0.944)
BACKGROUND: Final = 0.05
Known = Literal["nothing", "things", "things of the kind asked about"]
_SHAPES: Final = tuple(range(1, 1 + len(SHAPES)))
KINDS: Final[Mapping[TaskFamily, tuple[int, ...]]] = {
    "color": _SHAPES,
    "shape": _SHAPES,
    "count": _SHAPES,
    "number": (DIGIT,),
    "word": (WORD,),
    "chart": (CHART,),
}
"""Family of questions -> kinds of tokens (``train/labels.py``) that an answer is read from."""
LEARNED: Final[dict[TaskFamily, int]] = {family: QUOTAS[family] for family in KINDS}
"""Quotas of families that the sample model learned, without yes and no."""
_WAYS: Final[Mapping[str, Mapping[str, object]]] = {
    "dpp": {},
    "dpp, scout of 2 with injection": {"scout": 2, "scout_injection": True},
}


def quality(scene: Scene, side: int, kinds: Sequence[int] | None) -> Float32[Tensor, "1 1 n"]:
    """Return 1 where a token shows something of the kinds (None = anything), else ``BACKGROUND``.

    Args:    side: pixels of a token's.
    """
    shown = torch.from_numpy(label(scene, side)[0])
    there = shown > 0 if kinds is None else torch.isin(shown, torch.tensor(kinds))
    return torch.where(there, 1.0, BACKGROUND)[None, None]


class KnowingAsker(TransformersAsker):
    """Asks about generated pictures, of which it knows what they show."""

    def __init__(self, oracle: Oracle, config: EraConfig, known: Known) -> None:
        super().__init__(oracle, replace(config, question_aware=True))
        self._plain, self._known = config, known

    def prompts(self, subject: Subject, rate: float) -> Iterator[tuple[list[int], list[Segment]]]:
        assert isinstance(subject, Task)
        self._task, self._seen = subject, None
        return super().prompts(subject, rate)

    _task: Task
    _seen: VisualTokens | None = None

    def kept(self, text: str, images: Sequence[Image], rate: float) -> list[Segment]:
        """Return what stands for the picture."""
        if self._seen is None:
            self._seen = self._oracle.tokens(images, self._plain)
        tokens, config = self._seen, self._plain
        if self._known != "nothing":
            (asked,) = {each.family for each in self._task.questions if each.text == text}
            kinds = KINDS[asked] if self._known != "things" else None
            (scene,) = self._task.items[0].scenes
            known = quality(scene, scene.width // tokens.grid[1], kinds)
            tokens = replace(tokens, signals={**tokens.signals, Signal.RELEVANCE: known})
            options = {**dict(config.policy_options), "relevance_weight": 1.0}
            given = tuple(sorted(options.items()))
            config = replace(config, question_aware=True, policy_options=given)
        return segments_of(prune_blocks(tokens, config, rate))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the sample model."""
    parser = argparse.ArgumentParser(
        prog="python -m era_vllm.lab.known_objects", allow_abbrev=False
    )
    parser.add_argument("--count", type=int, default=60, help="pictures (default 60)")
    parser.add_argument("--seed", type=int, default=2026)
    arguments = parser.parse_args(argv)
    if arguments.count < 2:
        parser.error(f"--count: got {arguments.count}, allowed: 2 or more")
    material = load_material(split="test")
    tasks = draw_tasks(["standard"], arguments.seed, arguments.count, material, LEARNED)
    oracle = Oracle(str(CHECKPOINT))
    known: tuple[Known, ...] = ("nothing", "things", "things of the kind asked about")
    cells = [("unpruned", EraConfig(), known[0], 0.0)]
    for name, settings in _WAYS.items():
        config = EraConfig.parse({"policy": "dpp", **settings})
        cells.extend((name, config, what, rate) for what in known for rate in RATES)
    print("| policy | it knows | rate | right % |", "|---" * 4 + "|", sep="\n")
    with torch.inference_mode(), bar(len(cells) * len(tasks), "asking", "picture") as shown:
        for name, config, what, rate in cells:
            answers: list[list[Answer]] = []
            for given in KnowingAsker(oracle, config, what).each(tasks, rate):
                answers.append(given)
                shown.update()
            right = accuracy(count(tasks, answers))
            assert right is not None
            shown.write(f"| {name} | {what} | {rate:g} | {right.text()} |")


if __name__ == "__main__":
    main()
