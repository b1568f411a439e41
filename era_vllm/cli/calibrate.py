"""``era-vllm calibrate``: how much of the log-bias each layer takes, measured on pictures.

Leaves out the fit (``lab/calibrate.py``) and what reads the file (``calibration.py``).
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from era_vllm.cli.options import DEFAULT_MODEL, add_era_options, era_settings
from era_vllm.cli.preflight import check_folder
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.policies import make_policy

if TYPE_CHECKING:
    from PIL.Image import Image

    from era_vllm.config import Gamma
    from era_vllm.lab.calibrate import Case, Check
    from era_vllm.lab.oracle import Oracle

DESCRIPTION: Final = """Measure how much of the log-bias each layer takes to attend as unpruned.

  era-vllm calibrate                                     the sample model, generated pictures
  era-vllm calibrate MODEL pictures/ --era-policy dpp    a LLaVA-1.5 folder, your own pictures
  era-vllm serve MODEL --era-policy dpp --era-calibration out/calibration.json

No labels: unpruned attention and pruned attention are compared, on a few dozen pictures, and an
exponent of the mass (gamma) is worked out for each layer. Every second picture is kept back and
says what it is worth: attention, KL of the next word and equal next words, without bias, with the
paper's, and with gamma. Writes calibration.json and .png to --out. The file belongs to the model's
weights and to the policy; a server refuses it with others. Plain transformers, LLaVA-1.5.
"""
RATES: Final = (0.778, 0.889, 0.944)
PROMPTS: Final = (
    "What is shown in this picture?",
    "Describe the picture in one sentence.",
    "What text is in the picture?",
)
_SETTINGS: Final = ("no bias", "bias", "gamma")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    add("model", nargs="?", default=DEFAULT_MODEL, help="a folder (default: the sample model)")
    add("pictures", nargs="?", type=Path, help="a folder of pictures (default: generated ones)")
    text = "questions about each, a line each (default: three; generated pictures have their own)"
    add("--prompts", type=Path, metavar="FILE", help=text)
    add("--count", type=int, default=48, metavar="N", help="at most so many pictures (default 48)")
    text = "rates that gamma is to suit together (default .778 .889 .944)"
    add("--rates", nargs="+", type=float, default=RATES, metavar="R", help=text)
    text = "a gamma for each KV head of a layer, not one a layer"
    add("--per-head", action="store_true", help=text)
    add("--seed", type=int, default=31, help="of generated pictures (default 31)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="default: out")
    add_era_options(parser)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Fit, check, write."""
    del rest
    config = _config(arguments)
    check_folder(
        arguments.out,
        f"--out: the folder {str(arguments.out)!r} cannot be written to",
        "name another",
    )
    from era_vllm.bench.provenance import provenance
    from era_vllm.calibration import model_identity, write_gamma
    from era_vllm.cli.loading import open_oracle
    from era_vllm.lab.calibrate import PASSES, as_setting, check, fit
    from era_vllm.lab.screen import bar

    model_identity(Path(arguments.model))  # refuses what is no folder
    asked = list(islice(_asked(arguments), arguments.count))
    if len(asked) < 4:
        raise ConfigError(f"pictures: got {len(asked)}, needed 4 or more; a few dozen are right")
    oracle = open_oracle(arguments.model)
    make = [_cases(oracle, config, arguments.rates, image, prompts) for image, prompts in asked]
    fitted = [case for cases in make[::2] for case in cases]
    held_out = [case for cases in make[1::2] for case in cases]
    with bar(PASSES * len(fitted) + len(held_out), "calibrating", "question") as shown:
        values = fit(oracle, fitted, per_head=arguments.per_head, step=shown.update)
        settings: list[tuple[bool, Gamma]] = [(False, None), (True, None)]
        settings.append((True, as_setting(values)))
        found = check(oracle, held_out, settings, step=shown.update)
    path = arguments.out / "calibration.json"
    about = {
        "command": shlex.join(["era-vllm", *sys.argv[1:]]),
        "commit": provenance()["commit"],
        "rates": list(arguments.rates),
        "pictures": len(asked),
        "kl": dict(zip(_SETTINGS, found.kl.mean(1).tolist(), strict=True)),
        "agree": dict(zip(_SETTINGS, found.agree.mean(1).tolist(), strict=True)),
    }
    write_gamma(path, Path(arguments.model), config, values, about)
    draw(path.with_suffix(".png"), values, found)
    print(table(values, found, len(held_out)))
    print(f"\n{path} and .png; use it: --era-calibration {path}")
    return 0


def _config(arguments: argparse.Namespace) -> EraConfig:
    settings = era_settings(arguments)
    for name in ("gamma", "calibration"):
        if settings.get(name) is not None:
            raise ConfigError(f"--era-{name}: is what is worked out here; leave it out")
    if bad := [rate for rate in arguments.rates if not 0 < rate <= 0.99]:
        raise ConfigError(f"--rates: got {bad[0]:g}, allowed: above 0, at most 0.99")
    config = EraConfig.parse({**settings, "max_pruning_rate": max(0.95, *arguments.rates)})
    make_policy(config)
    if not config.bias:
        raise ConfigError("--era-no-bias: gamma is an exponent of the bias; leave it out")
    return config


def _asked(arguments: argparse.Namespace) -> "Iterator[tuple[Image, Sequence[str]]]":
    """Yield pictures with questions."""
    from era_vllm.cli.loading import open_pictures

    if arguments.pictures is None and arguments.prompts:
        raise ConfigError("--prompts: needs pictures of your own; generated ones have theirs")
    prompts = _prompts(arguments.prompts)
    for image, own in open_pictures(arguments.pictures, arguments.count, arguments.seed):
        yield image, own or prompts


def _prompts(file: Path | None) -> Sequence[str]:
    if file is None:
        return PROMPTS
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {str(file)!r}: cannot be read ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {str(file)!r}: has no line; needed a question a line")
    return prompts


def _cases(
    oracle: "Oracle",
    config: EraConfig,
    rates: Sequence[float],
    image: "Image",
    prompts: Sequence[str],
) -> "list[Case]":
    """Return each question, at one of the rates in turn."""
    from era_vllm.lab.asking import chat_prompt
    from era_vllm.lab.calibrate import Case
    from era_vllm.lab.oracle import segments_of

    whole = segments_of(oracle.reduce([image], config, 0.0))
    pruned = [segments_of(oracle.reduce([image], config, rate)) for rate in rates]
    cases: list[Case] = []
    for index, prompt in enumerate(prompts):
        text = chat_prompt(oracle.processor.tokenizer, prompt)
        kept = pruned[index % len(pruned)]
        ids = [oracle.prompt_ids(text, [len(each[0].anchors)]) for each in (whole, kept)]
        cases.append(Case(ids[0], whole, ids[1], kept))
    return cases


def table(values: Sequence[Sequence[float]], found: "Check", cases: int) -> str:
    """Return gamma by layer, and what it is worth, as Markdown."""
    lines = ["| layer | gamma | odds missing: bias | odds missing: gamma |", "|---" * 4 + "|"]
    for layer, row in enumerate(values):
        span = f"{min(row):.2f}" + (f" to {max(row):.2f}" if len(row) > 1 else "")
        missing = [f"{found.odds[index, layer].exp():.2f}" for index in (1, 2)]
        lines.append(f"| {layer} | {span} | {missing[0]} | {missing[1]} |")
    lines += ["", f"{cases} questions about pictures that were kept back:", ""]
    lines += ["| | KL of the next word | next word the same |", "|---" * 3 + "|"]
    for name, kl, agree in zip(_SETTINGS, found.kl.mean(1), found.agree.mean(1), strict=True):
        lines.append(f"| {name} | {kl:.4f} | {100 * agree:.1f} % |")
    gain = found.kl[1] - found.kl[2]
    error = 1.96 * gain.std() / len(gain) ** 0.5
    lines += ["", f"KL that gamma saves beside the bias: {gain.mean():+.4f} +- {error:.4f}"]
    return "\n".join(lines)


def draw(path: Path, values: Sequence[Sequence[float]], found: "Check") -> None:
    """Draw gamma, and odds of attending to pictures against unpruned, over layers."""
    from matplotlib.figure import Figure

    figure = Figure((8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    layers: Any = range(len(values))
    for head in range(len(values[0])):
        above.plot(layers, [row[head] for row in values], ".-", lw=0.8)
    above.axhline(1, color="0.7", lw=0.8)
    above.set_ylabel("gamma")
    for name, row, style in zip(_SETTINGS, found.odds, ("C3:", "C1--", "C0-"), strict=True):
        below.plot(layers, (-row).exp().tolist(), style, marker=".", label=name)
    below.axhline(1, color="0.7", lw=0.8)
    below.set_yscale("log")
    below.set_ylabel("odds of attending to the picture,\nagainst unpruned")
    below.set_xlabel("layer of the language model")
    below.legend()
    figure.savefig(path, dpi=110)
