"""``era-vllm ecl``: matrix entropy of visual tokens by layer, and where it collapses.

Leaves out the entropy (``lab/ecl.py``).
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from era_vllm.cli.options import DEFAULT_MODEL
from era_vllm.cli.preflight import check_least, check_out
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from era_vllm.bench.taken import Taken
    from era_vllm.lab.asking import Subject
    from era_vllm.lab.oracle import Segment

_QUESTION: Final = "What is shown?"
DESCRIPTION: Final = """Find the layer where the visual tokens' matrix entropy collapses.

  era-vllm ecl                         the sample model, generated pictures
  era-vllm ecl MODEL pictures/         a model's folder, your own pictures

EntropyPrune prunes by the states of that layer (its paper: 2 for LLaVA-1.5, 1 for Qwen2.5-VL). The
entropy says how many directions the tokens of a picture spread over; the layer in the first half of
the language model behind which it falls most is printed, with how many pictures agree. Writes
ecl.json and ecl.png to --out. Plain transformers, float32; of other families than LLaVA-1.5 an
engine in this process encodes the pictures, and ends (InternVLChatModel has no plain model).
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    add("model", nargs="?", default=DEFAULT_MODEL, help="a folder (default: the sample model)")
    add("pictures", nargs="?", type=Path, help="a folder of pictures (default: generated ones)")
    add("--count", type=int, default=32, metavar="N", help="at most so many pictures (default 32)")
    add("--seed", type=int, default=31, help="of generated pictures (default 31)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="default: out")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print."""
    out: Path = arguments.out
    check_out(out, ("ecl.json", "ecl.png"))
    check_least(arguments, count=1)
    import torch

    from era_vllm.bench.provenance import command, provenance
    from era_vllm.lab.ecl import SHARP, collapse

    rows = list(_rows(arguments))
    mean = torch.stack(rows).mean(0)
    found = collapse(mean)
    agree = sum(collapse(row) == found for row in rows)
    figures = {
        **provenance(),
        "command": command(),
        "pictures": len(rows),
        "ecl": found,
        "agree": agree,
        "entropy": mean.tolist(),
    }
    (out / "ecl.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draw(out / "ecl.png", torch.stack(rows), found)
    print(table(mean))
    where = (
        "none: entropy falls sharply behind no layer" if found is None else f"behind layer {found}"
    )
    print(f"\nEntropy Collapse Layer: {where} ({agree} of {len(rows)} pictures agree)")
    print(f"A fall below {100 * SHARP:.0f} % of the entropy before it is none; the bound is ours.")
    print(f"{out / 'ecl.json'} and .png")
    return 0


def _rows(arguments: argparse.Namespace) -> "Iterator[Float[Tensor, l]]":
    """Yield each picture's entropies, with a progress bar."""
    from era_vllm.cli.loading import open_language_oracle, open_oracle
    from era_vllm.cli.own_pictures import open_pictures
    from era_vllm.cli.taking import prunes_alone, subjects, taken_of
    from era_vllm.lab.asking import chat_ids
    from era_vllm.lab.ecl import layer_entropies
    from era_vllm.lab.oracle import segments_of
    from era_vllm.lab.screen import bar

    model, given = arguments.model, (arguments.count, arguments.seed)
    pictures, title = arguments.pictures, "matrix entropy"
    if prunes_alone(model):
        own = open_oracle(model)
        with bar(arguments.count, title, "picture") as shown:
            for image, _ in open_pictures(pictures, None, *given):
                segments = segments_of(own.reduce([image], EraConfig(), 0.0))
                yield layer_entropies(own, chat_ids(own, _QUESTION, segments), segments)
                shown.update()
        return
    encoded = subjects(model, pictures, None, *given, films=False)

    def read(
        taken: "Taken", _: int, subject: "Subject"
    ) -> "tuple[Sequence[int], Sequence[Segment]]":
        parts = [*(one.part() for one in subject.media), {"type": "text", "text": _QUESTION}]
        taken.forget()
        return taken.of([{"role": "user", "content": parts}], 0.0)

    prompts = list(taken_of(model, {}, encoded, "encoding", read))
    if not prompts:
        raise ConfigError("PICTURES: none is left; the reasons are above")
    oracle = open_language_oracle(model)
    with bar(len(prompts), title, "picture") as shown:
        for ids, segments in prompts:
            yield layer_entropies(oracle, ids, segments)
            shown.update()


def table(mean: "Float[Tensor, l]") -> str:
    """Return the mean by layer, and how it changed, as Markdown."""
    lines = ["| behind layer | entropy, nats | change |", "|---|---|---|"]
    change = ["", *(f"{value:+.3f}" for value in mean.diff().tolist())]
    for layer, value in enumerate(mean.tolist()):
        lines.append(f"| {layer or 'none'} | {value:.3f} | {change[layer]} |")
    return "\n".join(lines)


def draw(path: Path, rows: "Float[Tensor, p l]", found: int | None) -> None:
    """Draw each picture's entropies over layers, and their mean."""
    from matplotlib.figure import Figure

    figure = Figure((8, 4.5), layout="constrained")
    axis = figure.subplots()
    layers: Sequence[int] = range(rows.shape[1])
    for row in rows.tolist():
        axis.plot(layers, row, color="0.8", lw=0.6)
    axis.plot(layers, rows.mean(0).tolist(), "C0.-", label="mean")
    if found is not None:
        axis.axvline(found, color="C3", lw=0.8, ls="--", label=f"collapse: layer {found}")
    axis.set_xlabel("layers of the language model passed")
    axis.set_ylabel("matrix entropy of visual tokens, nats")
    axis.legend()
    figure.savefig(path, dpi=110)
