"""EntropyPrune as published, inside the language model, beside what is served: before layer 0.

    python -m era_vllm.lab.late_pruning --count 60

In the paper all visual tokens go through the first k layers, together with the text, and those of
lowest matrix entropy (of layer k - 1's queries, from 0) leave before layer k, with positions as
they were. Here a token that has left is one that no later row attends to, which is the same. Beside
it the same place with random tokens, and the policy ``entropyprune``, which prunes before layer 0
by what the same layers say of the picture alone. Plain transformers, LLaVA-1.5 (``oracle.py``).

Source: arXiv:2602.17196.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.asking import MAX_TOKENS, Answer, Subject, chat_ids, cleaned
from era_vllm.lab.known_objects import LEARNED
from era_vllm.lab.oracle import Oracle, Segment, segments_of
from era_vllm.lab.scores import accuracy, count
from era_vllm.lab.screen import bar
from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import draw_tasks
from era_vllm.steps.matrix_entropy import matrix_entropy
from era_vllm.steps.ranking import top
from era_vllm.steps.similarity import quantize

RATES: Final = (0.778, 0.889, 0.944)
_LATE: Final = ("EntropyPrune", "random")
_EARLY: Final = {"dropped": "dropped", "merged, log-size bias": "merged"}
"""What becomes of the others where the policy prunes -> its option."""
Choose = Callable[[Float[Tensor, "1 hq dh n"], int], Int[Tensor, "1 a"]]
"""From queries of a layer and K, the tokens that stay."""


def most_entropic(queries: Float[Tensor, "1 hq dh n"], count: int) -> Int[Tensor, "1 a"]:
    """Choose as EntropyPrune does, and the policy of that name."""
    return top(quantize(matrix_entropy(queries.float()).float()), count)


def at_random(seed: int) -> Choose:
    """Return a choice by chance, the same for a picture whenever it is made."""

    def choose(queries: Float[Tensor, "1 hq dh n"], count: int) -> Int[Tensor, "1 a"]:
        drawn = torch.Generator().manual_seed(seed)
        return torch.randperm(queries.shape[-1], generator=drawn)[:count].sort().values[None]

    return choose


def answer_late(
    oracle: Oracle, ids: Sequence[int], whole: Segment, layer: int, choose: Choose, kept: int
) -> tuple[str, Tensor]:
    """Prune while the language model runs on a prompt with one picture, unpruned.

    Args:
        layer: k: tokens leave before layer k, from 0; >= 1.
        kept: How many stay, K.

    Returns: the answer, and which tokens stayed.
    """
    layers = oracle.model.model.language_model.layers
    visual = oracle.is_visual(torch.tensor([list(ids)]), 1)[0].nonzero()[:, 0]
    chosen: list[Tensor] = []

    def read(_: nn.Module, __: object, output: Float[Tensor, "1 t c"]) -> None:
        if not chosen:  # by the prompt, of which an answer's later passes know no more
            heads = output[0, visual].unflatten(-1, (-1, layers[0].self_attn.head_dim))
            chosen.append(choose(heads.permute(1, 2, 0)[None], kept)[0])

    def without(_: nn.Module, args: object, given: dict[str, Any]) -> object:
        left = visual[~torch.isin(torch.arange(len(visual)), chosen[0])]
        mask = given["attention_mask"].clone()
        mask[..., left] = torch.finfo(mask.dtype).min
        # A row that nobody reads still needs something to attend to
        mask[..., left, left] = 0.0
        return args, {**given, "attention_mask": mask}

    with ExitStack() as stack:
        query = layers[layer - 1].self_attn.q_proj
        stack.callback(query.register_forward_hook(read).remove)
        for later in layers[layer:]:
            hook = later.register_forward_pre_hook(without, with_kwargs=True)
            stack.callback(hook.remove)
        said, _ = oracle.decode(ids, [whole], MAX_TOKENS, "original")
    return said, chosen[0]


@dataclass(frozen=True, slots=True)
class Row:
    """A way to prune, at a rate."""

    name: str
    rate: float
    config: EraConfig | None
    """What prunes before layer 0; None: what is chosen leaves later."""
    answers: list[list[Answer]] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    """Of each picture: how much of the published choice it keeps, as intersection over union."""


def rows_of(layer: int) -> list[Row]:
    """Return what is measured: unpruned, and at each rate the published way first."""
    rows = [Row("unpruned", 0.0, EraConfig())]
    for rate in RATES:
        rows += [Row(f"before layer {layer}: {name}", rate, None) for name in _LATE]
        for name, rest in _EARLY.items():
            options = {"entropyprune_k": layer, "rest": rest}
            config = EraConfig.parse({"policy": "entropyprune", "policy_options": options})
            rows.append(Row(f"before layer 0, {name}", rate, config))
    return rows


@torch.inference_mode()
def measure(oracle: Oracle, subjects: Sequence[Subject], layer: int) -> list[Row]:
    """Ask about pictures unpruned and pruned in each way at each rate, with a progress bar."""
    rows = rows_of(layer)
    with bar(len(subjects), "asking", "picture") as shown:
        for number, subject in enumerate(subjects):
            image = subject.media[0].picture()
            (whole,) = segments_of(oracle.reduce([image], EraConfig(), 0.0))
            late = {_LATE[0]: most_entropic, _LATE[1]: at_random(number)}
            published: dict[float, Tensor] = {}
            for row in rows:
                segment, choose = whole, late.get(row.name.rpartition(" ")[2])
                if row.config is not None:
                    (segment,) = segments_of(oracle.reduce([image], row.config, row.rate))
                kept, chosen = EraConfig().num_anchors(whole.n, row.rate), segment.anchors
                row.answers.append([])
                for question in subject.questions:
                    ids = chat_ids(oracle, question.text, [segment])
                    if choose is None:
                        said, _ = oracle.decode(ids, [segment], MAX_TOKENS, "original")
                    else:
                        said, chosen = answer_late(oracle, ids, whole, layer, choose, kept)
                    row.answers[-1].append(Answer(cleaned(said), kept))
                if row.rate:
                    row.same.append(_overlap(published.setdefault(row.rate, chosen), chosen))
            shown.update()
    return rows


def _overlap(one: Tensor, other: Tensor) -> float:
    both = len(set(one.tolist()) & set(other.tolist()))
    return both / (len(one) + len(other) - both)


def table(subjects: Sequence[Subject], rows: Sequence[Row]) -> str:
    """Return Markdown."""
    lines = ["| pruned | rate | right % | of the published choice |", "|---" * 4 + "|"]
    for row in rows:
        right = accuracy(count(subjects, row.answers))
        assert right is not None
        same = f"{sum(row.same) / len(row.same):.2f}" if row.same else "-"
        lines.append(f"| {row.name} | {row.rate:g} | {right.text()} | {same} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a LLaVA-1.5 folder."""
    parser = argparse.ArgumentParser(prog="python -m era_vllm.lab.late_pruning", allow_abbrev=False)
    parser.add_argument("model", nargs="?", default=str(CHECKPOINT), help="a LLaVA-1.5 folder")
    parser.add_argument("--count", type=int, default=60, help="pictures (default 60)")
    parser.add_argument("--layer", type=int, default=2, help="k, >= 1 (default 2, the paper's)")
    parser.add_argument("--seed", type=int, default=777)
    arguments = parser.parse_args(argv)
    oracle = Oracle(arguments.model)
    layers = len(oracle.model.model.language_model.layers)
    if not 1 <= arguments.layer < layers:
        parser.error(f"--layer: got {arguments.layer}, allowed: 1 to {layers - 1}, of {layers}")
    material = load_material(split="test")
    subjects = draw_tasks(["standard"], arguments.seed, arguments.count, material, LEARNED)
    print(table(subjects, measure(oracle, subjects, arguments.layer)))


if __name__ == "__main__":
    main()
