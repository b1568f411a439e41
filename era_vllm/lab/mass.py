"""How much attention falls on visual tokens, layer by layer: unpruned, pruned, merged, with bias.

    python -m era_vllm.lab.mass FOLDER --pictures 40 --rate .889

The figure by which the paper shows what rectified attention restores. Plain transformers with the
additive mask (``oracle.py``): of the row that gives the first word of an answer, the share of its
attention on visual tokens, mean over heads and questions. *needed*: by how much the odds of the
merged model's visual attention must grow to be the unpruned model's; *got*: by how much the bias
lets them grow. LLaVA-1.5 checkpoints; writes FOLDER's table to the screen, mass.json and mass.png.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from era_vllm.config import EraConfig
from era_vllm.errors import EraError
from era_vllm.lab.asking import chat_prompt
from era_vllm.lab.oracle import Oracle, Segment, segments_of
from era_vllm.lab.screen import bar
from era_vllm.lab.synth.dataset import generate
from era_vllm.policies import defaults, policy_names

STAGES: Final = ("unpruned", "pruned", "merged", "with bias")


def visual_mass(
    oracle: Oracle, text: str, segments: Sequence[Segment], *, bias: bool
) -> Float[Tensor, "layers"]:
    """Return the share of the last token's attention on visual tokens, mean over heads."""
    ids = oracle.prompt_ids(text, [len(segment.anchors) for segment in segments])
    visual = oracle.is_visual(torch.tensor([ids]), 1)[0]
    found: list[Tensor] = []

    def keep(_: object, __: object, given: tuple[Tensor, Tensor]) -> None:
        found.append(given[1][0, :, -1].float()[:, visual].sum(-1).mean())

    with ExitStack() as stack:
        for layer in oracle.model.model.language_model.layers:
            stack.callback(layer.self_attn.register_forward_hook(keep).remove)
        oracle.log_probs(ids, segments, 1, bias=bias)
    return torch.stack(found)


def measure(
    oracle: Oracle, pictures: int, config: EraConfig, rate: float, seed: int
) -> dict[str, Float[Tensor, "layers"]]:
    """Return the mean share of each stage over pictures and their questions."""
    shares: dict[str, list[Tensor]] = {stage: [] for stage in STAGES}
    bare = EraConfig.parse({**config.as_dict(), "merge": False, "bias": False})
    with bar(pictures, "attention mass", "picture") as shown:
        for example in generate(pictures, seed):
            images = [example.image]
            whole = segments_of(oracle.reduce(images, config, 0.0))
            kept = segments_of(oracle.reduce(images, bare, rate))
            merged = segments_of(oracle.reduce(images, config, rate))
            asked = (whole, False), (kept, False), (merged, False), (merged, True)
            for question in example.questions:
                text = chat_prompt(oracle.processor.tokenizer, question.text)
                for stage, (segments, bias) in zip(STAGES, asked, strict=True):
                    shares[stage].append(visual_mass(oracle, text, segments, bias=bias))
            shown.update()
    return {stage: torch.stack(found).mean(0) for stage, found in shares.items()}


def growth(
    shares: Mapping[str, Float[Tensor, "layers"]],
) -> tuple[Float[Tensor, "layers"], Float[Tensor, "layers"]]:
    """Return what the odds of the merged model need, and what the bias gives them."""
    odds = {stage: share / (1 - share) for stage, share in shares.items()}
    return odds["unpruned"] / odds["merged"], odds["with bias"] / odds["merged"]


def table(shares: Mapping[str, Float[Tensor, "layers"]]) -> str:
    """Return Markdown, a row a layer."""
    heads = ["layer", *(f"{stage} %" for stage in STAGES), "needed", "got"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for layer, (needed, got) in enumerate(zip(*growth(shares), strict=True)):
        parts = [f"{100 * shares[stage][layer]:.1f}" for stage in STAGES]
        lines.append("| " + " | ".join([str(layer), *parts, f"{needed:.2f}", f"{got:.2f}"]) + " |")
    return "\n".join(lines)


def draw(path: Path, title: str, shares: Mapping[str, Float[Tensor, "layers"]]) -> None:
    """Draw the four stages over layers."""
    from matplotlib.figure import Figure

    figure = Figure((8, 4.5), layout="constrained")
    axis = figure.subplots()
    for stage, style in zip(STAGES, ("k-", "C3:", "C1--", "C0-"), strict=True):
        axis.plot((100 * shares[stage]).tolist(), style, marker=".", label=stage)
    axis.set_xlabel("layer of the language model")
    axis.set_ylabel("attention on visual tokens, %")
    axis.set_ylim(0)
    axis.set_title(title, fontsize=10)
    axis.legend()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a folder."""
    parser = argparse.ArgumentParser(prog="python -m era_vllm.lab.mass", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=40, help="4 questions each (default 40)")
    parser.add_argument("--policy", choices=policy_names(), default="era")
    parser.add_argument("--rate", type=float, default=0.889)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--out", type=Path, default=Path("out"), help="default: out")
    arguments = parser.parse_args(argv)
    if not (arguments.folder / "config.json").is_file():
        parser.error(f"got {str(arguments.folder)!r}, needed a folder with a model's config.json")
    if arguments.pictures < 1:
        parser.error(f"--pictures: got {arguments.pictures}, allowed: 1 or more")
    try:
        config = defaults(arguments.policy, pruning_rate=arguments.rate)
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (EraError, OSError) as error:
        parser.error(str(error))
    oracle = Oracle(str(arguments.folder))
    shares = measure(oracle, arguments.pictures, config, arguments.rate, arguments.seed)
    print(table(shares))
    figures = {
        "model": arguments.folder.name,
        "policy": arguments.policy,
        "rate": arguments.rate,
        "pictures": arguments.pictures,
        "seed": arguments.seed,
        "shares": {stage: share.tolist() for stage, share in shares.items()},
    }
    (arguments.out / "mass.json").write_text(json.dumps(figures, indent=1) + "\n")
    title = f"{arguments.folder.name}, {arguments.policy} at {arguments.rate:g}"
    draw(arguments.out / "mass.png", title, shares)


if __name__ == "__main__":
    main()
