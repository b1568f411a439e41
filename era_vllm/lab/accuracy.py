"""Accuracy under pruning in plain transformers: policies against rates, with intervals.

    python -m era_vllm.lab.accuracy --pictures 100 --policies era dpp uniform --rates 0 .778 .889

Leaves out the engine: ``era-vllm accuracy`` (``cli/accuracy.py``) asks the same questions there.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.data import LEARNED_FAMILIES, Example, generate
from era_vllm.lab.oracle import Oracle, segments_of


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Right answers of one policy at one rate."""

    policy: str
    positions: str
    pruning_rate: float
    tokens: int
    right: int
    asked: int

    @property
    def interval(self) -> tuple[float, float, float]:
        """Return the fraction right and its 95 % Wilson interval."""
        z, n = 1.96, self.asked
        p = self.right / n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return p, middle - half, middle + half


def measure(
    oracle: Oracle, examples: Sequence[Example], config: EraConfig, pruning_rate: float
) -> Accuracy:
    """Ask every question with the pictures pruned; exact match counts."""
    right = asked = tokens = 0
    label = f"{config.policy} at {pruning_rate}"
    for example in tqdm(examples, desc=label, unit="picture", leave=False):
        pruned = oracle.reduce([example.image], config, pruning_rate)
        tokens = pruned.anchors.shape[1]
        for question in example.questions:
            text = f"USER: <image> {question.text} ASSISTANT:"
            right += (
                oracle.answer(text, segments_of(pruned), positions=config.positions)
                == question.answer
            )
            asked += 1
    return Accuracy(config.policy, config.positions, pruning_rate, tokens, right, asked)


def table(rows: Sequence[Accuracy]) -> str:
    """Return a Markdown table."""
    lines = [
        f"{rows[0].asked} questions, exact match, 95 % intervals",
        "",
        "| policy | positions | pruning rate | tokens | right |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        p, low, high = (100 * x for x in row.interval)
        lines.append(
            f"| {row.policy} | {row.positions} | {row.pruning_rate} | {row.tokens} | "
            f"{p:.1f} % ({low:.1f}-{high:.1f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(CHECKPOINT), help="default: the sample model")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--policies", nargs="+", default=["era", "dpp"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0, 0.5, 0.778, 0.889, 0.944])
    parser.add_argument("--positions", choices=("original", "compact"), default="original")
    parser.add_argument("--no-merge", action="store_true")
    parser.add_argument("--no-bias", action="store_true")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    asked = parser.parse_args()
    oracle = Oracle(asked.model, torch.bfloat16)
    examples = list(generate(asked.pictures, seed=asked.seed, families=LEARNED_FAMILIES))
    rows: list[Accuracy] = []
    for policy in asked.policies:
        config = EraConfig(
            policy=policy,
            positions=asked.positions,
            merge=not asked.no_merge,
            bias=not asked.no_bias,
            max_pruning_rate=0.999,
        )
        rows += [measure(oracle, examples, config, rate) for rate in asked.rates]
    if asked.json:
        print(json.dumps([{**asdict(row), "interval": row.interval} for row in rows], indent=1))
        return
    print(table(rows))


if __name__ == "__main__":
    main()
