"""``era-vllm eval``: right answers over HTTP, policies and options against rates.

Leaves out the asking (``lab/evaluation.py``), the figures (``lab/scores.py``) and the page
(``lab/eval_report.py``).
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from era_vllm.cli.options import DEFAULT_MODEL
from era_vllm.cli.preflight import check_folder
from era_vllm.errors import ConfigError
from era_vllm.policies import policy_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from era_vllm.lab.evaluation import Variant
    from era_vllm.lab.synth.tasks import Task

DESCRIPTION: Final = """Ask held-out questions about generated pictures over HTTP, and score them.

  era-vllm eval                                        the sample model, era at five rates
  era-vllm eval MODEL --policies era dpp random uniform    a server each
  era-vllm eval --variant bias=false --variant merge=false,bias=false    era, and era without these
  era-vllm eval --url http://HOST:8000 --rates 0 .889   a server that is up: only rates differ

A model that takes videos is asked about pictures of any size, several pictures and videos; any
other about pictures as the sample model's. Pictures suit the sample models alone. Writes eval.md,
eval.json, eval.png to --out, and each answer to answers.jsonl there: the same command goes on where
it was stopped.
"""
RATES: Final = (0.0, 0.5, 0.778, 0.889, 0.944)
_KINDS: Final = ("picture", "several", "film", "standard")
_SERVER: Final = (
    "--enforce-eager --max-model-len 1024 --max-num-seqs 8 --kv-cache-memory-bytes 256M"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add, names = parser.add_argument, ", ".join(policy_names())
    add("model", nargs="?", metavar="MODEL", help="a folder (default: the sample model)")
    add("--url", help="of a server of era-vllm that is up, in place of MODEL")
    text = f"of {names} (default era); each is a server"
    add("--policies", nargs="+", default=["era"], metavar="NAME", help=text)
    text = "settings beside each policy as NAME=VALUE,..., e.g. bias=false; repeatable"
    add("--variant", action="append", default=[], metavar="SETTINGS", help=text)
    text = "pruning rates; 0 is what the others stand against (default 0 .5 .778 .889 .944)"
    add("--rates", nargs="+", type=float, default=RATES, metavar="R", help=text)
    text = "kinds of tasks (default: by what the model takes)"
    add("--tasks", nargs="+", choices=_KINDS, help=text)
    add("--count", type=int, default=60, metavar="N", help="tasks of each kind (default 60)")
    add("--seed", type=int, default=777, help="of the tasks (default 777)")
    text = f"of era-vllm serve, as one word (default: {_SERVER})"
    add("--server", default=_SERVER, metavar="FLAGS", help=text)
    text = "default: out/eval"
    add("--out", type=Path, default=Path("out/eval"), metavar="DIR", help=text)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Ask, write the page and print its table."""
    del rest
    variants = _variants(arguments)
    out: Path = arguments.out
    check_folder(out, f"--out: the folder {str(out)!r} cannot be written to", "name another")
    from era_vllm.bench.provenance import provenance
    from era_vllm.lab import eval_report
    from era_vllm.lab.evaluation import Answers, cells, evaluate
    from era_vllm.lab.screen import bar

    kinds = arguments.tasks or _suitable(arguments)
    head: dict[str, Any] = {
        "model": arguments.url or arguments.model or DEFAULT_MODEL,
        "tasks": dict.fromkeys(kinds, arguments.count),
        "seed": arguments.seed,
        "server": None if arguments.url else arguments.server,
    }
    answers = Answers(out, head)
    subjects = _tasks(kinds, arguments)
    wanted = cells(variants, sorted(set(arguments.rates)))
    with bar(len(wanted) * len(subjects), "asking", "task") as shown:
        rows = list(evaluate(subjects, wanted, answers, _served(arguments), shown))
    scored = eval_report.scored(subjects, rows)
    head["model"] = arguments.url or Path(head["model"]).name
    head |= {**provenance(), "command": shlex.join(["era-vllm", *sys.argv[1:]])}
    page = eval_report.markdown(head, scored)
    (out / "eval.md").write_text(page, encoding="utf-8")
    figures = {**head, "rows": [row.as_dict() for row in scored]}
    (out / "eval.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    eval_report.draw(out / "eval.png", f"{head['model']}, {len(subjects)} tasks", scored)
    print(page)
    print(f"{out / 'eval.md'}, .json and .png")
    return 0


def _variants(arguments: argparse.Namespace) -> "list[Variant]":
    """Read policies x (nothing, each --variant); refuse what cannot be.

    Raises:
        ConfigError: a number out of its range, a setting of another name, or --url with these.
    """
    from era_vllm.config import EraConfig
    from era_vllm.lab.evaluation import Variant

    if arguments.count < 2:
        raise ConfigError(f"--count: got {arguments.count}, allowed: 2 or more")
    if bad := [rate for rate in arguments.rates if not 0 <= rate <= 0.95]:
        raise ConfigError(f"--rates: got {bad[0]:g}, allowed: numbers in [0, 0.95]")
    if arguments.url and arguments.model:
        raise ConfigError("MODEL and --url: choose one; the server of --url has its model")
    if arguments.url and (arguments.variant or arguments.policies != ["era"]):
        raise ConfigError(
            "--policies and --variant: a server that is up has its own; leave them out with --url"
        )
    settings = [(), *(_settings(text) for text in arguments.variant)]
    variants = [Variant(policy, each) for policy, each in product(arguments.policies, settings)]
    for variant in variants:
        EraConfig.parse({"policy": variant.policy, **dict(variant.options)})
    return variants


def _settings(text: str) -> tuple[tuple[str, object], ...]:
    found: list[tuple[str, object]] = []
    for word in text.split(","):
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise ConfigError(f"--variant: got {text!r}, needed NAME=VALUE,..., e.g. bias=false")
        try:
            found.append((name.strip(), json.loads(value)))
        except json.JSONDecodeError:
            found.append((name.strip(), value))
    return tuple(found)


def _suitable(arguments: argparse.Namespace) -> Sequence[str]:
    """Choose the kinds of tasks by what the model takes: videos, or one picture."""
    if arguments.url:
        import urllib.request

        with urllib.request.urlopen(f"{arguments.url}/v1/era", timeout=10) as reply:
            takes = json.load(reply)["modalities"]
    else:
        folder = Path(arguments.model or DEFAULT_MODEL)
        takes = ["video"] if (folder / "video_preprocessor_config.json").exists() else []
    return ("picture", "several", "film") if "video" in takes else ("standard",)


def _tasks(kinds: Sequence[str], arguments: argparse.Namespace) -> "list[Task]":
    """Draw held-out tasks that have questions."""
    from era_vllm.lab.screen import progress
    from era_vllm.lab.synth.assets import load_material
    from era_vllm.lab.synth.tasks import KINDS, draw_task

    progress(f"painting {arguments.count} tasks of each kind: {', '.join(kinds)}")
    material = load_material(split="test")
    drawn = [
        draw_task(kind, arguments.seed, number, material)
        for kind in KINDS
        if kind in kinds
        for number in range(arguments.count)
    ]
    return [task for task in drawn if task.questions]


def _served(arguments: argparse.Namespace) -> "Callable[[Variant], AbstractContextManager[str]]":
    """Return what starts a server of a variant, or stands for the one of --url."""
    from era_vllm.lab.evaluation import at
    from era_vllm.lab.servers import Server, wait_for

    if arguments.url:
        return lambda _: at(arguments.url.rstrip("/"))
    import torch

    flags = shlex.split(arguments.server)
    if not torch.cuda.is_available() and "--dtype" not in flags:
        flags += ["--dtype", "float32"]  # a CPU without AVX-512 has no fast bfloat16
    model = arguments.model or DEFAULT_MODEL
    command = [sys.executable, "-P", "-m", "era_vllm.cli.main", "serve", model, *flags]
    command += ["--served-model-name", "eval"]

    @contextmanager
    def start(variant: "Variant") -> Iterator[str]:
        environment = {"TORCH_COMPILE_DISABLE": "1", **variant.variables()}
        log = arguments.out / f"{variant.name.replace(' ', '_')}.log"
        with Server(f"the server of {variant.name}", command, environment, log) as server:
            wait_for([server])
            yield server.url

    return start
