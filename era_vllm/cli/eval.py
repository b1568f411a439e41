"""``era-vllm eval``: right answers to generated questions, policies and options against rates.

Leaves out who answers (``askers.py``), the asking (``lab/evaluation.py``), the figures
(``lab/scores.py``) and the page (``lab/eval_report.py``).
"""

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Final

from era_vllm.cli import askers
from era_vllm.cli.options import DEFAULT_MODEL, named_value
from era_vllm.cli.preflight import check_least, check_out
from era_vllm.config import DEFAULT_POLICY
from era_vllm.errors import ConfigError, unknown_name
from era_vllm.policies import make_policy, policy_names

if TYPE_CHECKING:
    from era_vllm.lab.evaluation import Variant
    from era_vllm.lab.mass import Mass
    from era_vllm.lab.synth.tasks import Task

DESCRIPTION: Final = """Ask held-out questions about generated pictures, and score the answers.

  era-vllm eval                                        the sample model at five rates
  era-vllm eval MODEL --policies era dpp random uniform    a server each
  era-vllm eval --variant bias=false --variant positions=compact     as it is, and with either
  era-vllm eval --url http://HOST:8000 --rates 0 .889   a server that is up: only rates differ
  era-vllm eval --asker engine                          no server: vLLM in this process
  era-vllm eval --asker transformers --rates 0          no vLLM (LLaVA-1.5 alone)

A row for each variant and rate: right answers, by family of questions too, and how far answers are
from the unpruned ones (the same text; KL of the first token), with 95 % intervals; tokens, seconds.
--mass adds the share of attention that falls on visual tokens, by layer (LLaVA-1.5 alone).
Settle on options with --split dev (the photos and digits that the sample models learned from, in
pictures of their own), and read --split test, which is held out, once.
MODEL is a folder. One that takes videos is asked about pictures of any size, several pictures and
videos; any other about pictures as the sample model's. The pictures suit the sample models alone:
for a model and pictures of your own there is era-vllm recommend.
Writes eval.md, eval.json, eval.png (and mass.png) to --out, and each answer to answers.jsonl there:
the same command goes on where it was stopped.
"""
RATES: Final = (0.0, 0.5, 0.778, 0.889, 0.944)
_KINDS: Final = ("picture", "several", "film", "standard")
_RATE_FIELDS: Final = ("pruning_rate", "min_pruning_rate", "max_pruning_rate", "levels")
_NOT_VARIED: Final = {
    "policy": "name it with --policies",
    **dict.fromkeys(_RATE_FIELDS, "each request says its rate: --rates"),
}
_PAGES: Final = ("eval.md", "eval.json", "eval.png", "mass.png")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add, names = parser.add_argument, ", ".join(policy_names())
    add("model", nargs="?", metavar="MODEL", help="a folder (default: the sample model)")
    text = "who answers: a server, vLLM in this process, plain transformers (default http)"
    add("--asker", choices=askers.ASKERS, default="http", help=text)
    text = f"of {names} (default {DEFAULT_POLICY}); each is a server or an engine"
    add("--policies", nargs="+", metavar="NAME", help=text)
    text = "settings beside each policy as NAME=VALUE,..., e.g. bias=false; repeatable"
    add("--variant", action="append", default=[], metavar="SETTINGS", help=text)
    text = "pruning rates; 0 is what the others stand against (default 0 .5 .778 .889 .944)"
    add("--rates", nargs="+", type=float, default=RATES, metavar="R", help=text)
    text = "kinds of tasks (default: by what the model takes)"
    add("--tasks", nargs="+", choices=_KINDS, help=text)
    text = "families of questions about single pictures (default: all; videos have their own)"
    add("--families", nargs="+", metavar="NAME", help=text)
    add("--count", type=int, default=60, metavar="N", help="tasks of each kind (default 60)")
    add("--seed", type=int, default=777, help="of the tasks (default 777)")
    text = "what pictures are made of: test, held out (the default), or dev"
    add("--split", choices=("dev", "test"), default="test", help=text)
    text = "tasks whose attention on visual tokens is measured too, at every row (default 0)"
    add("--mass", type=int, default=0, metavar="N", help=text)
    text = "a folder of photos to paint them on (default: the split's)"
    add("--backgrounds", type=Path, metavar="DIR", help=text)
    add("--out", type=Path, default=Path("out/eval"), metavar="DIR", help="default: out/eval")
    askers.add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask, write the page and print its table."""
    check_least(arguments, count=2)
    if not 0 <= arguments.mass <= arguments.count:
        raise ConfigError(
            f"--mass: got {arguments.mass}, allowed: 0 to {arguments.count} (--count says)"
        )
    if arguments.url and (arguments.variant or arguments.policies):
        raise ConfigError(
            "--policies, --variant: a server that is up has its own; leave them out with --url"
        )
    variants, rates = _variants(arguments), sorted(set(arguments.rates))
    from era_vllm.bench.provenance import command, provenance
    from era_vllm.lab import eval_report
    from era_vllm.lab.asking import MAX_TOKENS
    from era_vllm.lab.evaluation import Variant, cells
    from era_vllm.lab.mass import draw

    source = askers.source(arguments, rates, MAX_TOKENS, arguments.asker)
    if arguments.mass and arguments.url:
        raise ConfigError("--mass: is for a model's folder; leave it out with --url")
    if arguments.mass:
        askers.check_reference("--mass", source.head["model"])
    if source.policy:
        variants = [Variant(source.policy)]
    common = ("picture", "several", "film") if "video" in source.modalities else ("standard",)
    kinds, origin = arguments.tasks or common, provenance()
    subjects, wanted = _tasks(kinds, arguments), cells(variants, rates)
    out: Path = arguments.out
    check_out(out, _PAGES)
    photos = arguments.backgrounds
    head = {**source.head, "tasks": dict.fromkeys(kinds, arguments.count), "seed": arguments.seed}
    head |= {"split": arguments.split}
    head |= {"commit": origin["commit"], "versions": origin["versions"]}
    head |= {"backgrounds": f"{photos.resolve()} {askers.files_of(photos)}"} if photos else {}
    head |= askers.code(source, variants) | _calibrations(variants)
    head |= {"families": sorted(arguments.families)} if arguments.families else {}
    rows = askers.answered("eval", out, head, subjects, wanted, source.asker_of)
    scored = eval_report.scored(subjects, rows)
    head |= {**origin, "model": source.title, "command": command()}
    figures = {**head, "rows": [row.as_dict() for row in scored]}
    masses: list[Mass] = []
    if arguments.mass:
        masses = _masses(source.head["model"], subjects[: arguments.mass], wanted)
        head |= {"mass": arguments.mass}
        figures |= {"mass": [row.as_dict() for row in masses]}
        draw(out / "mass.png", f"{source.title}, {arguments.mass} tasks", masses)
    page = eval_report.markdown(head, scored, masses)
    (out / "eval.md").write_text(page, encoding="utf-8")
    (out / "eval.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    eval_report.draw(out / "eval.png", f"{source.title}, {len(subjects)} tasks", scored)
    print(page)
    print(f"{out / 'eval.md'}, .json and .png{' (and mass.png)' if masses else ''}")
    return 0


def _masses(
    model: str, subjects: "Sequence[Task]", wanted: "Sequence[tuple[Variant, float]]"
) -> "list[Mass]":
    """Return attention on visual tokens at every row, in plain transformers."""
    from era_vllm.calibration import calibrated
    from era_vllm.config import EraConfig
    from era_vllm.lab.mass import measure

    rows = [
        (variant.row(rate), EraConfig.parse(calibrated(model, variant.settings)), rate)
        for variant, rate in wanted
    ]
    return measure(askers.oracle_of(model, "float32"), subjects, rows)


def _variants(arguments: argparse.Namespace) -> "list[Variant]":
    """Read policies x (nothing, each --variant), each once.

    Raises:
        ConfigError: a setting of another name, or one that is said elsewhere.
    """
    from era_vllm.calibration import calibrated
    from era_vllm.config import EraConfig

    model = arguments.model or DEFAULT_MODEL
    settings = [(), *(_settings(text) for text in arguments.variant)]
    variants: dict[EraConfig, Variant] = {}
    for policy, each in product(arguments.policies or [DEFAULT_POLICY], settings):
        variant = askers.variant_of(policy, each)
        config = EraConfig.parse(calibrated(model, variant.settings))
        make_policy(config)  # refuses an unknown name
        variants.setdefault(config, variant)
    return list(variants.values())


def _calibrations(variants: "Sequence[Variant]") -> dict[str, object]:
    """Return what the files of calibrated variants hold, so that other files are other answers."""
    paths = [variant.settings.get("calibration") for variant in variants]
    found = {str(path): hashlib.sha256(Path(str(path)).read_bytes()) for path in paths if path}
    return {"calibrations": {path: of.hexdigest() for path, of in found.items()}} if found else {}


def _settings(text: str) -> tuple[tuple[str, object], ...]:
    found: list[tuple[str, object]] = []
    for word in re.split(r",(?=\s*[a-z_]+=)", text):
        if (setting := named_value(word)) is None:
            raise ConfigError(f"--variant: got {text!r}, needed NAME=VALUE,..., e.g. bias=false")
        if (name := setting[0]) in _NOT_VARIED:
            raise ConfigError(f"--variant: got {name}; {_NOT_VARIED[name]}")
        found.append(setting)
    return tuple(found)


def _tasks(kinds: Sequence[str], arguments: argparse.Namespace) -> "list[Task]":
    """Draw tasks of the split that have questions.

    Raises:
        ConfigError: an unknown family, or a folder of photos that has none.
    """
    from era_vllm.lab.screen import progress
    from era_vllm.lab.synth.assets import load_material
    from era_vllm.lab.synth.tasks import KINDS, QUOTAS, draw_task

    families = arguments.families or QUOTAS
    if unknown := [name for name in families if name not in QUOTAS]:
        raise ConfigError(unknown_name("family", unknown[0], sorted(QUOTAS)))
    quotas = {name: QUOTAS[name] for name in families}
    progress(f"painting {arguments.count} tasks of each kind: {', '.join(kinds)}")
    split = "train" if arguments.split == "dev" else "test"
    material = load_material(arguments.backgrounds, split)
    drawn = [
        draw_task(kind, arguments.seed, number, material, quotas=quotas)
        for kind in KINDS
        if kind in kinds
        for number in range(arguments.count)
    ]
    if not (found := [task for task in drawn if task.questions]):
        raise ConfigError(f"--families: {', '.join(families)}: no task has such a question")
    return found
