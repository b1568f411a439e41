"""Who answers ``eval`` and ``recommend``: a server, started here or up, an engine, transformers.

Leaves out what is asked (``eval.py``, ``recommend.py``) and how (``lab/asking.py``).
"""

import argparse
import hashlib
import http.client
import json
import os
import shlex
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from era_vllm.cli.options import DEFAULT_MODEL, era_variables
from era_vllm.errors import ConfigError, EraError, UnsupportedError

if TYPE_CHECKING:
    from era_vllm.lab.asking import Asker, ServerAsker, Subject
    from era_vllm.lab.evaluation import Row, Variant
    from era_vllm.lab.oracle import Oracle

ASKERS: Final = ("http", "engine", "transformers")
MOST_RATE: Final = 0.95
"""``EraConfig.max_pruning_rate``, of what is started here."""
SERVER: Final = "--enforce-eager --max-model-len 1024 --max-num-seqs 8 --kv-cache-memory-bytes 256M"
_OWN_FLAGS: Final = ("--era-", "--no-era-", "--host", "--port", "--served-model-name", "--dtype")
_SECRETS: Final = ("--api-key", "--hf-token")
"""Flags whose values would be written to answers and reports."""
_KV_BYTES: Final = 256 << 20  # of an engine, as of SERVER
_START_S: Final = 3600.0  # a server that ends says so at once; large weights take their time
_BLOCK: Final = 32
"""Tokens of an engine's block: questions share the whole blocks of a picture, and of a CPU's 128
few are whole (SmolLM2 at .5: 2.4 times the time)."""
_KEY: Final = "OPENAI_API_KEY"


@dataclass(frozen=True, slots=True)
class Source:
    """A model, and what answers for it."""

    head: Mapping[str, Any]
    """What identifies it, and how it is computed: ``asker``, ``model`` ..."""
    title: str
    modalities: Sequence[str]
    policy: str | None
    """Of a server that is up; None: as it is started."""
    levels: Mapping[str, float]
    """Names of rates that it serves."""
    asker_of: "Callable[[Variant], AbstractContextManager[Asker]]"
    """What starts it with a variant's settings, or stands for the one that is up."""


def add_options(parser: argparse.ArgumentParser, server: str = SERVER) -> None:
    """Add what chooses a model and what answers for it."""
    add = parser.add_argument
    add("--url", help=f"of a server of era-vllm that is up, in place of MODEL; its key: ${_KEY}")
    text = "number format (default: bfloat16 on a GPU or a CPU that has it, else float32)"
    add("--dtype", choices=("bfloat16", "float16", "float32"), help=text)
    text = f"of era-vllm serve, as one word (default: {server})"
    add("--server", metavar="FLAGS", help=text)


def source(
    arguments: argparse.Namespace,
    rates: Sequence[float],
    max_tokens: int,
    asker: str = "http",
    server: str = SERVER,
    *,
    passes_over: bool = False,
) -> Source:
    """Look at the model or the server; refuse what cannot be before anything is started.

    Args:
        arguments: Of ``add_options``, ``model`` and ``out``.
        rates: That it will be asked at.
        max_tokens: Of an answer.
        asker: Of ``ASKERS``, for a model's folder.
        server: Flags of its server where none are given.
        passes_over: What a server will not take is left out.

    Raises:
        ConfigError: no such model or server, rates that it does not serve, flags that are said
            elsewhere.
        UnsupportedError: plain transformers does not prune this family.
    """
    from era_vllm.lab.asking import SHOWN, ServerAsker

    if bad := [rate for rate in rates if not 0 <= rate <= MOST_RATE]:
        raise ConfigError(f"--rates: got {bad[0]:g}, allowed: numbers in [0, {MOST_RATE:g}]")
    if arguments.url and arguments.model:
        raise ConfigError("MODEL and --url: choose one; the server of --url has its model")
    connect = partial(ServerAsker, max_tokens=max_tokens, shown=SHOWN, passes_over=passes_over)
    if arguments.url:
        if arguments.server is not None or arguments.dtype or asker != "http":
            raise ConfigError(
                "--asker, --dtype, --server: a server that is up has its own; leave them out with "
                "--url"
            )
        return _of_server(arguments.url.rstrip("/"), rates, connect)
    if arguments.server is not None and asker != "http":
        raise ConfigError(f"--server: is for --asker http, got {asker}; leave it out")
    given = server if arguments.server is None else arguments.server
    return _of_folder(arguments, _server_flags(given), asker, max_tokens, connect)


def answered(
    command: str,
    out: Path,
    head: Mapping[str, object],
    subjects: "Sequence[Subject]",
    wanted: "Sequence[tuple[Variant, float]]",
    asker_of: "Callable[[Variant], AbstractContextManager[Asker]]",
) -> "list[Row]":
    """Ask what has no answer yet in a folder, with a progress bar; return all answers."""
    from era_vllm.lab.evaluation import Answers, evaluate
    from era_vllm.lab.screen import bar

    with Answers(out, head) as answers:
        try:
            with bar(len(wanted) * len(subjects), "asking", "subject") as shown:
                return list(evaluate(subjects, wanted, answers, asker_of, shown))
        except KeyboardInterrupt:
            print(f"\nera-vllm {command}: the same command goes on here", file=sys.stderr)
            raise
        except EraError as error:
            raise type(error)(
                f"{error}\nWhat was answered is kept: the same command goes on"
            ) from error


def files_of(folder: Path) -> str:
    """Return a hash of what stands in a folder: names, sizes, times."""
    files = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file():
            about = file.stat()
            files.update(
                os.fsencode(file.name) + f" {about.st_size} {about.st_mtime_ns}\n".encode()
            )
    return files.hexdigest()


def code(source: Source, variants: "Sequence[Variant]") -> dict[str, object]:
    """Return what makes the numbers, where they are made here: our code, and others' policies'."""
    import era_vllm
    from era_vllm.vllm_plugin.build import build

    if source.policy:  # of a server that is up, which said so
        return {}
    root = Path(era_vllm.__file__).parent / "lab"  # questions, and the reference
    lab = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(root.rglob("*.py"))))
    return {"code": [*sorted({build(one.policy) for one in variants}), lab.hexdigest()[:12]]}


def check_reference(option: str, model: str) -> None:
    """Refuse what plain transformers cannot prune here.

    Raises:
        UnsupportedError: another family than LLaVA-1.5.
    """
    from era_vllm.cli.loading import LLAVA, architectures, model_config

    if (names := architectures(model_config(model))) != [LLAVA]:
        raise UnsupportedError(
            f"{option}: got {', '.join(names)}, allowed: {LLAVA}, the one whose tower and pruning "
            "are here without vLLM"
            f"{'; choose engine or http' if option.startswith('--asker') else '; leave it out'}"
        )


def variant_of(policy: str, options: "tuple[tuple[str, object], ...]" = ()) -> "Variant":
    """Return a policy with options; one that reads questions is given them."""
    from era_vllm.lab.evaluation import Variant
    from era_vllm.policies import defaults

    if defaults(policy).question_aware and "question_aware" not in dict(options):
        options = (*options, ("question_aware", True))
    return Variant(policy, options)


def _server_flags(given: str) -> list[str]:
    from era_vllm_server.settings import ServerSettings

    try:
        flags = shlex.split(given)
    except ValueError as error:
        raise ConfigError(f"--server: got {given!r}: {error}") from error
    if own := [flag for flag in flags if flag.startswith(_OWN_FLAGS)]:
        raise ConfigError(
            f"--server: got {own[0]}, which is said by a flag of this command; see --help"
        )
    if secret := [flag for flag in flags if flag.startswith(_SECRETS)]:
        raise ConfigError(
            f"--server: {secret[0].partition('=')[0]}: its value would stand in the report; set "
            "VLLM_API_KEY or HF_TOKEN in the environment"
        )
    of_settings = {f"ERA_{name.upper()}" for name in ServerSettings.model_fields}
    if found := sorted((era_variables() | of_settings) & os.environ.keys()):
        raise ConfigError(
            f"{found[0]}: is set in the environment, and the servers would read it; unset it "
            "(flags of this command say how they prune)"
        )
    return flags


def _of_folder(
    arguments: argparse.Namespace,
    flags: Sequence[str],
    asker: str,
    max_tokens: int,
    connect: "Callable[..., ServerAsker]",
) -> Source:
    """Return what is started from a model's folder."""
    from era_vllm.bench.provenance import fast_dtype
    from era_vllm.cli.loading import architectures, model_config
    from era_vllm.config import LEVELS
    from era_vllm.vllm_plugin.families import FAMILIES

    model = arguments.model or DEFAULT_MODEL
    folder = Path(model).resolve()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"MODEL: got {model!r}, needed a folder with a model's config.json")
    names = architectures(model_config(str(folder)))
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        raise ConfigError(f"MODEL: got {', '.join(names)}, allowed: {', '.join(sorted(FAMILIES))}")
    if asker == "transformers":
        check_reference("--asker transformers", str(folder))
    dtype = arguments.dtype or fast_dtype()
    head: dict[str, object] = {"model": str(folder), "files": files_of(folder), "dtype": dtype}
    head |= {"asker": asker} | ({"server": shlex.join(flags)} if asker == "http" else {})

    def asker_of(variant: "Variant") -> "AbstractContextManager[Asker]":
        if asker == "transformers":
            return _transformers(str(folder), dtype, variant, max_tokens)
        if asker == "engine":
            return _engine(str(folder), dtype, variant, max_tokens)
        words = ["serve", str(folder), *flags, "--dtype", dtype]
        return _server(words, arguments.out, variant, connect)

    return Source(head, folder.name, family.modalities, None, dict(LEVELS), asker_of)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key goes to the address that was named, and to no other."""

    def redirect_request(self, *_: object) -> None:
        """Follow none."""


def _of_server(url: str, rates: Sequence[float], connect: "Callable[..., ServerAsker]") -> Source:
    """Return a server that is up, by what it says it is."""
    key = (os.environ.get(_KEY) or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"${_KEY}: has characters that no key has; set it anew")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    try:
        asked = urllib.request.Request(f"{url}/v1/era", headers=headers)
        with direct.open(asked, timeout=10) as reply:
            about = json.load(reply)
        limits, levels, title = about["limits"], dict(about["levels"]), str(about["model"])
        head = {"url": url, "model": title, "settings": about["settings"], "asker": "http"}
        head["server"] = about["versions"]
        head |= {"limits": limits, "identity": about.get("identity")}
        takes, policy = list(about["modalities"]), str(about["policy"])
        low, high = limits["min_pruning_rate"], limits["max_pruning_rate"]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        raise ConfigError(
            f"--url: {url}/v1/era: {type(error).__name__}: {error}; needed the address of a server "
            "of era-vllm serve, like http://127.0.0.1:8000 (without /v1)"
            f"{'' if key else f'; a server with keys wants one in ${_KEY}'}"
        ) from error
    if not head["identity"]:
        raise ConfigError(
            f"--url: {url} is an older era-vllm, which does not tell what it runs; upgrade it"
        )
    if bad := [rate for rate in rates if not low <= rate <= high]:
        raise ConfigError(f"--rates: got {bad[0]:g}, the server allows [{low:g}, {high:g}]")

    def asker_of(_: "Variant") -> "AbstractContextManager[Asker]":
        return connect(url, key=key or None)

    return Source(head, title, takes, policy, levels, asker_of)


@contextmanager
def _server(
    words: Sequence[str], out: Path, variant: "Variant", connect: "Callable[..., ServerAsker]"
) -> "Iterator[Asker]":
    from era_vllm.lab.evaluation import setting
    from era_vllm.lab.servers import Server, wait_for

    command = [sys.executable, "-P", "-m", "era_vllm.cli.main", *words]
    command += ["--served-model-name", "model"]
    environment = {f"ERA_{name.upper()}": setting(of) for name, of in variant.settings.items()}
    environment["TORCH_COMPILE_DISABLE"] = "1"
    log = out / "server.log"
    with Server(f"the server of {variant.name}", command, environment, log) as server:
        wait_for([server], _START_S)
        try:
            with connect(server.url) as asker:
                list(asker.each([_first()], None))
                yield asker
        except UnsupportedError as error:
            raise UnsupportedError(f"{error}\n{server.tail()}") from error


def _first() -> "Subject":
    """Return what a server that was just started is asked first, whose time would mislead."""
    from PIL import Image

    from era_vllm.lab.media import png
    from era_vllm.lab.recommendation import Prompt, Shown

    picture = Image.effect_noise((336, 336), 64).convert("RGB")
    return Shown("the first request", (png(picture),), (Prompt("What is this?"),))


@contextmanager
def _engine(model: str, dtype: str, variant: "Variant", most: int) -> "Iterator[Asker]":
    from era_vllm.bench.setup import started

    more = {"max_num_batched_tokens": 4096, "block_size": _BLOCK, "dtype": dtype}
    more |= {"context": 1024, "kv_bytes": _KV_BYTES}
    with started(f" of {variant.name}", model, variant.settings, **more) as llm:
        from era_vllm.bench.engines import EngineAsker

        yield EngineAsker(llm, most)


@contextmanager
def _transformers(model: str, dtype: str, variant: "Variant", most: int) -> "Iterator[Asker]":
    from era_vllm.calibration import calibrated
    from era_vllm.config import EraConfig
    from era_vllm.lab.asking import TransformersAsker

    config = EraConfig.parse(calibrated(model, variant.settings))
    yield TransformersAsker(oracle_of(model, dtype), config, most)


@cache
def oracle_of(model: str, dtype: str) -> "Oracle":
    """Return a checkpoint in plain transformers, the same for the same resolved path."""
    import torch

    from era_vllm.cli.loading import open_oracle

    return open_oracle(model, getattr(torch, dtype))
