"""``era-vllm eval``: right answers over HTTP, policies and options against rates.

Leaves out the asking (``lab/evaluation.py``), the figures (``lab/scores.py``) and the page
(``lab/eval_report.py``).
"""

import argparse
import hashlib
import http.client
import json
import os
import re
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from era_vllm.cli.options import DEFAULT_MODEL, era_variables
from era_vllm.cli.preflight import check_folder
from era_vllm.errors import ConfigError, EraError
from era_vllm.policies import make_policy, policy_names

if TYPE_CHECKING:
    from era_vllm.lab.evaluation import Variant
    from era_vllm.lab.synth.tasks import Task

DESCRIPTION: Final = """Ask held-out questions about generated pictures over HTTP, and score them.

  era-vllm eval                                        the sample model, era at five rates
  era-vllm eval MODEL --policies era dpp random uniform    a server each
  era-vllm eval --variant bias=false --variant merge=false,bias=false    era, and era without these
  era-vllm eval --url http://HOST:8000 --rates 0 .889   a server that is up: only rates differ

MODEL is a folder. One that takes videos is asked about pictures of any size, several pictures and
videos; any other about pictures as the sample model's. Pictures suit the sample models alone.
Writes eval.md, eval.json, eval.png to --out, and each answer to answers.jsonl there: the same
command goes on where it was stopped. Servers compute in bfloat16 on a GPU or a CPU that has it,
else in float32.
"""
RATES: Final = (0.0, 0.5, 0.778, 0.889, 0.944)
_KINDS: Final = ("picture", "several", "film", "standard")
_SERVER: Final = (
    "--enforce-eager --max-model-len 1024 --max-num-seqs 8 --kv-cache-memory-bytes 256M"
)
_RATE_FIELDS: Final = ("pruning_rate", "min_pruning_rate", "max_pruning_rate", "levels")
_NOT_VARIED: Final = {
    "policy": "name it with --policies",
    **dict.fromkeys(_RATE_FIELDS, "each request says its rate: --rates"),
}
_OWN_FLAGS: Final = ("--era-", "--no-era-", "--host", "--port", "--served-model-name")
_PAGES: Final = ("eval.md", "eval.json", "eval.png")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add, names = parser.add_argument, ", ".join(policy_names())
    add("model", nargs="?", metavar="MODEL", help="a folder (default: the sample model)")
    add("--url", help="of a server of era-vllm that is up, in place of MODEL")
    text = f"of {names} (default era); each is a server"
    add("--policies", nargs="+", metavar="NAME", help=text)
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
    flags, rates = _flags(arguments), sorted(set(arguments.rates))
    out: Path = arguments.out
    if arguments.url:
        head, variants, takes = _of_server(arguments.url.rstrip("/"), rates)
        title = str(head["model"])
    else:
        variants = _variants(arguments)
        head, takes = _of_folder(arguments.model or DEFAULT_MODEL, flags)
        title = Path(str(head["model"])).name
    check_folder(out, f"--out: the folder {str(out)!r} cannot be written to", "name another")
    for name in _PAGES:
        if (out / name).exists() and not (out / name).is_file():
            raise ConfigError(f"--out: {str(out / name)!r} is no file; name another folder")
    from era_vllm.bench.provenance import provenance
    from era_vllm.lab import eval_report
    from era_vllm.lab.evaluation import Answers, cells, evaluate
    from era_vllm.lab.screen import bar

    common = ("picture", "several", "film") if "video" in takes else ("standard",)
    kinds, origin = arguments.tasks or common, provenance()
    head |= {"tasks": dict.fromkeys(kinds, arguments.count), "seed": arguments.seed}
    head |= {"commit": origin["commit"], "versions": origin["versions"]}
    command = shlex.join(["era-vllm", *sys.argv[1:]])
    with Answers(out, head) as answers:
        subjects = _tasks(kinds, arguments)
        wanted = cells(variants, rates)
        served = _served(arguments, flags, str(head.get("model")))
        try:
            with bar(len(wanted) * len(subjects), "asking", "task") as shown:
                rows = list(evaluate(subjects, wanted, answers, served, shown))
        except KeyboardInterrupt:
            print("\nera-vllm eval: stopped; the same command goes on here", file=sys.stderr)
            return 130
        except EraError as error:
            raise type(error)(
                f"{error}\nWhat was answered is kept: the same command goes on"
            ) from error
    scored = eval_report.scored(subjects, rows)
    head |= {**origin, "model": title, "command": command}
    page = eval_report.markdown(head, scored)
    (out / "eval.md").write_text(page, encoding="utf-8")
    figures = {**head, "rows": [row.as_dict() for row in scored]}
    (out / "eval.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    eval_report.draw(out / "eval.png", f"{title}, {len(subjects)} tasks", scored)
    print(page)
    print(f"{out / 'eval.md'}, .json and .png")
    return 0


def _flags(arguments: argparse.Namespace) -> list[str]:
    """Read what servers are started with; refuse what cannot be, before anything is looked at.

    Raises:
        ConfigError: a number out of its range, --url with what a server has, flags of ours.
    """
    if arguments.count < 2:
        raise ConfigError(f"--count: got {arguments.count}, allowed: 2 or more")
    if bad := [rate for rate in arguments.rates if not 0 <= rate <= 0.95]:
        raise ConfigError(f"--rates: got {bad[0]:g}, allowed: numbers in [0, 0.95]")
    if arguments.url and arguments.model:
        raise ConfigError("MODEL and --url: choose one; the server of --url has its model")
    if arguments.url and (arguments.variant or arguments.policies or arguments.server != _SERVER):
        raise ConfigError(
            "--policies, --variant, --server: a server that is up has its own; leave them out with "
            "--url"
        )
    try:
        flags = shlex.split(arguments.server)
    except ValueError as error:
        raise ConfigError(f"--server: got {arguments.server!r}: {error}") from error
    if own := [flag for flag in flags if flag.startswith(_OWN_FLAGS)]:
        raise ConfigError(
            f"--server: got {own[0]}, which eval says itself; --policies and --variant choose how "
            "it prunes"
        )
    return flags


def _variants(arguments: argparse.Namespace) -> "list[Variant]":
    """Read policies x (nothing, each --variant), each once.

    Raises:
        ConfigError: a setting of another name, or one that is said elsewhere.
    """
    from era_vllm.config import EraConfig
    from era_vllm.lab.evaluation import Variant
    from era_vllm_server.settings import ServerSettings

    ours = era_variables() | {f"ERA_{name.upper()}" for name in ServerSettings.model_fields}
    if found := sorted(ours & os.environ.keys()):
        raise ConfigError(
            f"{found[0]}: is set in the environment, and the servers would read it; unset it "
            "(--policies and --variant say how they prune)"
        )
    settings = [(), *(_settings(text) for text in arguments.variant)]
    variants: dict[EraConfig, Variant] = {}
    for policy, each in product(arguments.policies or ["era"], settings):
        config = EraConfig.parse({"policy": policy, **dict(each)})
        make_policy(config)  # refuses an unknown name
        variants.setdefault(config, Variant(policy, each))
    return list(variants.values())


def _settings(text: str) -> tuple[tuple[str, object], ...]:
    found: list[tuple[str, object]] = []
    for word in re.split(r",(?=\s*[a-z_]+=)", text):
        name, sign, value = (part.strip() for part in word.partition("="))
        if not sign or not name:
            raise ConfigError(f"--variant: got {text!r}, needed NAME=VALUE,..., e.g. bias=false")
        if name in _NOT_VARIED:
            raise ConfigError(f"--variant: got {name}; {_NOT_VARIED[name]}")
        for read in (json.loads, float, str):
            try:
                found.append((name, read(value)))
                break
            except ValueError:
                continue
    return tuple(found)


def _of_folder(model: str, flags: list[str]) -> tuple[dict[str, Any], Sequence[str]]:
    """Return what identifies a model and how it is computed, and the modalities it takes.

    Raises:
        ConfigError: no folder of a model that is served.
    Mutates: flags, by the number format where none is named.
    """
    from era_vllm.bench.provenance import fast_dtype
    from era_vllm.cli.loading import architectures, model_config
    from era_vllm.vllm_plugin.families import FAMILIES

    folder = Path(model).resolve()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"MODEL: got {model!r}, needed a folder with a model's config.json")
    names = architectures(model_config(str(folder)))
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        raise ConfigError(f"MODEL: got {', '.join(names)}, allowed: {', '.join(sorted(FAMILIES))}")
    if not any(flag.partition("=")[0] == "--dtype" for flag in flags):
        flags += ["--dtype", fast_dtype()]
    files = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file():
            about = file.stat()
            files.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    server = shlex.join(flags)
    return {"model": str(folder), "files": files.hexdigest(), "server": server}, family.modalities


def _of_server(
    url: str, rates: Sequence[float]
) -> "tuple[dict[str, Any], list[Variant], Sequence[str]]":
    """Return what a server says it is, the one variant that it serves, and its modalities.

    Raises:
        ConfigError: nothing of ours answers there, or it serves other rates.
    """
    from era_vllm.lab.evaluation import Variant

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/v1/era", timeout=10) as reply:
            about = json.load(reply)
        limits, settings = about["limits"], about["settings"]
        head = {"url": url, "model": about["model"], "settings": settings}
        head["server"] = about["versions"]
        takes, policy = list(about["modalities"]), str(about["policy"])
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        raise ConfigError(
            f"--url: {url}/v1/era: {type(error).__name__}: {error}; needed the address of a server "
            "of era-vllm serve, like http://127.0.0.1:8000 (without /v1)"
        ) from error
    low, high = limits["min_pruning_rate"], limits["max_pruning_rate"]
    if bad := [rate for rate in rates if not low <= rate <= high]:
        raise ConfigError(f"--rates: got {bad[0]:g}, the server allows [{low:g}, {high:g}]")
    return head, [Variant(policy)], takes


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


def _served(
    arguments: argparse.Namespace, flags: Sequence[str], model: str
) -> "Callable[[Variant], AbstractContextManager[str]]":
    """Return what starts a server of a variant, or stands for the one of --url."""
    from era_vllm.errors import UnsupportedError
    from era_vllm.lab.servers import Server, wait_for

    if arguments.url:
        return lambda _: nullcontext(arguments.url.rstrip("/"))
    command = [sys.executable, "-P", "-m", "era_vllm.cli.main", "serve", model, *flags]
    command += ["--served-model-name", "eval"]
    started: list[str] = []

    @contextmanager
    def start(variant: "Variant") -> Iterator[str]:
        started.append(variant.name)
        environment = {"TORCH_COMPILE_DISABLE": "1", **variant.variables()}
        log = arguments.out / f"server_{len(started)}.log"
        with Server(f"the server of {variant.name}", command, environment, log) as server:
            wait_for([server])
            try:
                yield server.url
            except UnsupportedError as error:
                raise UnsupportedError(f"{error}\n{server.tail()}") from error

    return start
