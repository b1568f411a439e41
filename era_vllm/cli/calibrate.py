"""``era-vllm calibrate``: how much log-bias there is, and each layer takes, measured on pictures.

Leaves out the fit (``lab/calibrate.py``) and what reads the file (``calibration.py``).
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from era_vllm.calibration import SECTIONS
from era_vllm.cli.options import DEFAULT_MODEL, add_era_options, era_settings
from era_vllm.cli.preflight import check_out
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.policies import make_policy

if TYPE_CHECKING:
    from era_vllm.bench.taken import Taken
    from era_vllm.config import Gamma
    from era_vllm.lab.asking import Subject
    from era_vllm.lab.calibrate import Case, Check
    from era_vllm.lab.oracle import LanguageOracle

DESCRIPTION: Final = """Measure how much of the log-bias each layer takes to attend as unpruned.

  era-vllm calibrate                                     the sample model, generated pictures
  era-vllm calibrate MODEL pictures/ --era-policy dpp    a model's folder, your own pictures
  era-vllm calibrate --era-preset paper --sections mass_scale gamma       rho of era, then gamma
  era-vllm serve MODEL --era-policy dpp --era-calibration out/calibration.json

No labels: unpruned attention and pruned attention are compared, on a few dozen pictures, and an
exponent of the mass (gamma) is worked out for each layer. Every second picture is kept back and
says what it is worth: attention, KL of the next word and equal next words, without bias, with the
paper's, and with what was found. mass_scale is one number for all layers, of era's weighting by
saliency; gamma beside it is measured with it. Writes calibration.json and .png to --out. The file
belongs to the model's weights and to the policy; a server refuses it with others. Plain
transformers, float32: a 7B takes 28 GB, and some ten passes a picture. Of LLaVA-1.5 it prunes too;
of other families an engine in this process does, which ends before the passes.
"""
RATES: Final = (0.778, 0.889, 0.944)
NAME: Final = "calibration"
_NOT_HERE: Final = (
    "calibration", "gamma", "bias", "pruning_rate", "min_pruning_rate", "max_pruning_rate",
    "levels", "bias_store", "bias_columns", "separators", "frames_per_segment",
    "allow_extrapolation",
)  # fmt: skip
"""Settings that are what is worked out, said by --rates, or nothing to what is measured."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    add("model", nargs="?", default=DEFAULT_MODEL, help="a folder (default: the sample model)")
    text = "a folder of pictures (default: generated ones, which suit the sample models)"
    add("pictures", nargs="?", type=Path, help=text)
    text = "questions, as recommend reads them (default: a photo's; generated pictures have theirs)"
    add("--prompts", type=Path, metavar="FILE", help=text)
    add("--count", type=int, default=48, metavar="N", help="pictures at most (default 48)")
    text = "rates that gamma is to suit together (default .778 .889 .944)"
    add("--rates", nargs="+", type=float, default=RATES, metavar="R", help=text)
    text = "what to work out: gamma, mass_scale (default gamma)"
    add("--sections", nargs="+", choices=SECTIONS, default=["gamma"], metavar="NAME", help=text)
    text = "a gamma for each KV head of a layer, not one a layer"
    add("--per-head", action="store_true", help=text)
    add("--seed", type=int, default=31, help="of generated pictures (default 31)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="default: out")
    add_era_options(parser, without=_NOT_HERE)


def run(arguments: argparse.Namespace) -> int:
    """Fit, check, write."""
    config = _config(arguments)
    path = arguments.out / f"{NAME}.json"
    check_out(arguments.out, (path.name, f"{NAME}.png"))
    from era_vllm.bench.provenance import command, provenance
    from era_vllm.calibration import model_identity, write
    from era_vllm.lab.calibrate import (
        MASS_PASSES,
        PASSES,
        as_setting,
        check,
        fit,
        fit_mass,
        rescaled,
    )
    from era_vllm.lab.screen import bar

    if arguments.count < 4:
        raise ConfigError(f"--count: got {arguments.count}, allowed: 4 or more; a few dozen")
    model_identity(Path(arguments.model))  # refuses what is no folder
    oracle, cases = _cases(arguments, config)
    fitted, held_out = ([case for own in cases[at::2] for case in own] for at in (0, 1))
    _check_cases(oracle, [*fitted, *held_out])
    wanted = arguments.sections
    passes = MASS_PASSES * ("mass_scale" in wanted) + PASSES * ("gamma" in wanted)
    settings: dict[str, tuple[bool, Gamma, float]] = {
        "no bias": (False, None, 1.0),
        "bias": (True, None, 1.0),
    }
    growth, sections = 1.0, dict[str, tuple[EraConfig, object]]()
    with bar(passes * len(fitted) + len(held_out), "calibrating", "question") as shown:
        common: dict[str, Any] = {"positions": config.positions, "step": shown.update}
        if "mass_scale" in wanted:
            before = asdict(make_policy(config))["mass_scale"]  # type: ignore[call-overload]
            scale = round(before * fit_mass(oracle, fitted, **common), 4)
            growth = scale / before
            settings["mass_scale"] = True, None, growth
            sections["mass_scale"] = config, scale
            options = {**dict(config.policy_options), "mass_scale": scale}
            config = replace(config, policy_options=tuple(sorted(options.items())))
            fitted = [replace(case, pruned=rescaled(case.pruned, growth)) for case in fitted]
        if "gamma" in wanted:
            values = fit(oracle, fitted, per_head=arguments.per_head, **common)
            settings["gamma"] = True, as_setting(values), growth
            sections["gamma"] = config, values
        checked = check(oracle, held_out, list(settings.values()), **common)
    names = list(settings)
    about = {
        "command": command(),
        "commit": provenance()["commit"],
        "rates": list(arguments.rates),
        "pictures": len(cases),
        "kl": dict(zip(names, checked.kl.mean(1).tolist(), strict=True)),
        "agree": dict(zip(names, checked.agree.mean(1).tolist(), strict=True)),
        "kl_saved": checked.gain,
    }
    write(path, Path(arguments.model), sections, about)
    found = {name: values for name, (_, values) in sections.items()}
    draw(path.with_suffix(".png"), found, names, checked)
    print(table(found, names, checked, len(held_out)))
    print(f"\n{path} and .png; {verdict(checked, path)}")
    return 0


def _config(arguments: argparse.Namespace) -> EraConfig:
    if bad := [rate for rate in arguments.rates if not 0 < rate <= 0.99]:
        raise ConfigError(f"--rates: got {bad[0]:g}, allowed: above 0, at most 0.99")
    config = EraConfig.parse(_settings(arguments))
    policy = make_policy(config)
    of_era = {"weighting": "saliency", "centroid": "mean"}
    if "mass_scale" in arguments.sections and any(
        getattr(policy, name, None) != value for name, value in of_era.items()
    ):
        raise ConfigError(
            "--sections mass_scale: needs era's weighting by saliency, of plain means, which alone "
            "has it; add --era-preset paper, or leave mass_scale out"
        )
    if arguments.per_head and "gamma" not in arguments.sections:
        raise ConfigError("--per-head: is of gamma, which --sections leaves out; leave one out")
    if "mass_scale" in arguments.sections and not getattr(policy, "mass_scale", 0.0):
        raise ConfigError(
            "--sections mass_scale: got mass_scale=0, which cannot grow; leave it out"
        )
    return config


def _settings(arguments: argparse.Namespace) -> dict[str, object]:
    return {**era_settings(arguments), "max_pruning_rate": max(0.95, *arguments.rates)}


def _cases(
    arguments: argparse.Namespace, config: EraConfig
) -> "tuple[LanguageOracle, list[list[Case]]]":
    """Return plain transformers, and the cases of each picture: pruned by itself, or an engine.

    Raises:
        ConfigError: too little memory, or pictures that do not do.
        UnsupportedError: a family that is not served, or that transformers does not have.
    """
    from era_vllm.cli.loading import open_language_oracle, open_oracle
    from era_vllm.cli.own_pictures import open_pictures
    from era_vllm.cli.taking import prunes_alone, subjects, taken_of
    from era_vllm.lab.screen import bar

    model = arguments.model
    found: list[list[Case]] = []
    given = arguments.pictures, arguments.prompts, arguments.count, arguments.seed
    if given[0] is None and given[1]:
        raise ConfigError("--prompts: needs pictures of your own; generated ones have theirs")
    if not prunes_alone(model):
        asked_about = subjects(model, *given, films=True)
        _check_count(len(asked_about))

        def read(taken: "Taken", number: int, subject: "Subject") -> "list[Case]":
            from era_vllm.bench.taken import engine_cases

            return list(engine_cases(taken, arguments.rates, number, subject))

        found += taken_of(model, _settings(arguments), asked_about, "pruning", read)
        _check_count(len(found))
        return open_language_oracle(model), found
    from era_vllm.lab.calibrate import cases_of

    asked = list(open_pictures(*given))
    if bad := [text for _, questions in asked for text in questions if "<image>" in text]:
        raise ConfigError(f"--prompts: got {bad[0][:80]!r}; a question holds no <image>")
    _check_count(len(asked))
    oracle = open_oracle(model)
    with bar(len(asked), "pruning", "picture") as shown:
        for number, (image, questions) in enumerate(asked):
            found.append(cases_of(oracle, config, arguments.rates, (number, image, questions)))
            shown.update()
    return oracle, found


def _check_count(count: int) -> None:
    if count < 4:
        raise ConfigError(f"PICTURES: got {count}, needed 4 or more; a few dozen are right")


def _check_cases(oracle: "LanguageOracle", cases: "Sequence[Case]") -> None:
    """Refuse prompts longer than the model, and a policy that gives no bias."""
    most = oracle.model.config.get_text_config().max_position_embeddings
    if (longest := max(len(case.whole_ids) for case in cases)) > most:
        raise ConfigError(f"--prompts: one has {longest} tokens with its picture, allowed: {most}")
    if not any(segment.log_bias.any() for case in cases for segment in case.pruned):
        raise ConfigError(
            "--era-policy: this one gives no bias, of which gamma is the exponent; choose one "
            "that merges, or the option of it that weighs"
        )


def verdict(found: "Check", path: Path) -> str:
    """Say whether to use it."""
    gain, error = found.gain
    if gain > error:
        return f"use it: --era-calibration {path}"
    said = "loses" if gain < -error else "gains nothing that these pictures show"
    return f"it {said} in the next word: measure answers before you use it (era-vllm eval)"


def table(values: Mapping[str, object], names: Sequence[str], found: "Check", cases: int) -> str:
    """Return what was found by layer, and what it is worth, as Markdown."""
    lines = [f"mass_scale: {values['mass_scale']}", ""] if "mass_scale" in values else []
    headings = [f" odds missing: {name} |" for name in names[1:]]
    lines += ["| layer | gamma |" + "".join(headings), "|---" * (2 + len(headings)) + "|"]
    gamma: Any = values.get("gamma", [[1.0]] * found.odds.shape[1])
    for layer, row in enumerate(gamma):
        span = f"{min(row):.2f}" + (f" to {max(row):.2f}" if len(row) > 1 else "")
        missing = [f" {found.odds[index, layer].exp():.2f} |" for index in range(1, len(names))]
        lines.append(f"| {layer} | {span} |" + "".join(missing))
    lines += ["", "Odds missing: of attending to a picture, unpruned over pruned; 1 = as unpruned."]
    lines += ["", f"{cases} questions about pictures that were kept back:", ""]
    lines += ["| | KL of the next word | next word the same |", "|---" * 3 + "|"]
    for name, kl, agree in zip(names, found.kl.mean(1), found.agree.mean(1), strict=True):
        lines.append(f"| {name} | {kl:.4f} | {100 * agree:.1f} % |")
    gain, error = found.gain
    lines += ["", f"KL that {names[-1]} saves beside the bias: {gain:+.4f} +- {error:.4f} (95 %)"]
    return "\n".join(lines)


def draw(path: Path, values: Mapping[str, object], names: Sequence[str], found: "Check") -> None:
    """Draw gamma, and odds of attending to pictures against unpruned, over layers."""
    from matplotlib.figure import Figure

    figure = Figure((8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    gamma: Any = values.get("gamma", [[1.0]] * found.odds.shape[1])
    layers: Any = range(len(gamma))
    for head in range(len(gamma[0])):
        above.plot(layers, [row[head] for row in gamma], ".-", lw=0.8)
    above.axhline(1, color="0.7", lw=0.8)
    above.set_ylabel("gamma")
    for name, row, style in zip(names, found.odds, ("C3:", "C1--", "C2-.", "C0-"), strict=False):
        below.plot(layers, (-row).exp().tolist(), style, marker=".", label=name)
    below.axhline(1, color="0.7", lw=0.8)
    below.set_yscale("log")
    below.set_ylabel("odds of attending to the picture,\nagainst unpruned")
    below.set_xlabel("layer of the language model")
    below.legend()
    figure.savefig(path, dpi=110)
