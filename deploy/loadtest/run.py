#!/usr/bin/env python3
"""READ FIRST: one command that loads a server at each pruning level and plots what it gives.

vLLM's own benchmark client (``client.py``) asks, level after level at each concurrency, with
pictures that no cache has seen. Without --url a server of ours is started beside it. Leaves out
mixed traffic, aborts and bad images: ``locustfile.py`` and ``soak.py``.
"""

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Final

from era_vllm.bench.provenance import provenance
from era_vllm.bench.report import table
from era_vllm.errors import EraError, UnsupportedError
from era_vllm.lab.dummy import FAMILIES, IMAGE_SIZE, SIZES, make_dummy, size_of
from era_vllm.lab.screen import progress
from era_vllm.lab.servers import Server, wait_for

DESCRIPTION: Final = """Load a server at each pruning level, one concurrency after the other.

  deploy/loadtest/run.py                                      the shipped 8 MB model
  deploy/loadtest/run.py --model 0.9b --concurrency 1,2,4     a real model's shape, dummy weights
  deploy/loadtest/run.py --model qwen3-vl-2b --video .25      a quarter of the requests with a video
  deploy/loadtest/run.py --url http://HOST:8000 --tokenizer MODEL    a server that is up already

Every picture is new, so that no cache answers. Closed loop: as many requests are under way as the
concurrency says. Goodput: requests a second that kept both limits of --goodput. Writes
OUT/NAME.json (figures with commit, versions and hardware) and OUT/NAME.png. $API_KEY is the key,
where one is needed; --server hands flags on to `era-vllm serve`.
"""
SAMPLE: Final = "sample"
MODELS: Final[Mapping[str, tuple[str, str]]] = {
    **{shape: ("llava", shape) for shape in SIZES if shape != "qwen3-vl-2b"},
    "qwen3-vl-2b": ("qwen3-vl", "qwen3-vl-2b"),
    "qwen3-vl-0.2b": ("qwen3-vl", "0.2b"),
    "qwen3-vl-tiny": ("qwen3-vl", "tiny"),
}
"""Name -> family and shape of a model without weights."""
MEASURES: Final = ("rps", "goodput_rps", "ttft_ms", "ttft_p90_ms", "tpot_ms", "tpot_p90_ms")
_ERA_VLLM: Final = str(Path(sys.executable).with_name("era-vllm"))
_FLAGS: Final[Mapping[str, Sequence[str]]] = {
    SAMPLE: ("--max-model-len", "1024", "--kv-cache-memory-bytes", "256M"),
    "dummy": ("--kv-cache-memory-bytes", "1G", "--load-format", "dummy"),
}
_SIDES: Final = {SAMPLE: 168, "llava": IMAGE_SIZE, "qwen3-vl": 512}
"""Pixels of a picture's side; Qwen3-VL takes any, 512 are 256 tokens."""
_CONTEXT: Final = 1024


def main() -> int:
    """Read the options, measure, write and print; return the exit code."""
    arguments = options()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    busy = os.getloadavg()[0]  # before anything of ours: more than 0.5 a core spoils the figures
    with tempfile.TemporaryDirectory() as folder, served(arguments, Path(folder)) as (url, where):
        facts, model = get(url, "/v1/era"), get(url, "/v1/models")["data"][0]["id"]
        name, title = named(arguments, model)
        if arguments.video and "video" not in (takes := facts["modalities"]):
            raise UnsupportedError(f"--video: got a server that takes {', '.join(takes)}")
        cells = sweep(url, model, where, arguments, Path(folder))
    report = {
        "loadtest": name,
        **provenance(),
        "command": shlex.join(sys.argv),
        "model": title,
        "settings": {
            "levels": arguments.levels,
            "concurrency": arguments.concurrency,
            "requests": arguments.requests,
            "rounds": arguments.rounds,
            "output_tokens": arguments.output_tokens,
            "side": arguments.side,
            "video": arguments.video,
            "video_side": arguments.video_side,
            "frames": arguments.frames,
            "goodput_ms": arguments.goodput,
            "server": arguments.server,
        },
        "load_average_before": busy,
        "era": facts,
        "cells": cells,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    from plot import draw

    draw(arguments.out / f"{name}.png", report["model"], summary(cells), arguments.goodput)
    print(shown(cells))
    print(f"\n{arguments.out / name}.json and .png")
    failed = sum(cell["failed"] for cell in cells)
    if failed:
        print(f"loadtest: {failed} requests failed; the JSON says why")
    return int(failed > 0)


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", help="of a server that is up (default: one is started)")
    add("--tokenizer", help="with --url: the model whose tokenizer counts (default: the served)")
    add(
        "--model",
        choices=[SAMPLE, *MODELS],
        default=SAMPLE,
        help="without --url: the shipped checkpoint, or a shape with dummy weights",
    )
    add("--levels", type=_words, default=["off", "medium", "strong", "extreme"])
    add("--concurrency", type=_numbers, default=[1, 2, 4, 8, 16])
    add("--requests", type=int, default=32, help="of a cell, at least 2 x concurrency")
    add("--rounds", type=int, default=1, help="how often all of it; medians are plotted")
    add("--output-tokens", type=int, default=16)
    add(
        "--goodput",
        type=_limits,
        default={"ttft": 1000.0, "tpot": 200.0},
        metavar="ttft:MS,tpot:MS",
        help="what a good request keeps (default: ttft:1000,tpot:200)",
    )
    add("--side", type=int, help="pixels of a picture's side (default: the model's)")
    text = "share of the requests that hold a video in place of a picture (default: %(default)g)"
    add("--video", type=float, default=0.0, metavar="SHARE", help=text)
    add("--video-side", type=int, default=128, help="pixels of a frame's, a multiple of 16")
    add("--frames", type=int, default=8, help="of a video, two a second (default: %(default)d)")
    add("--server", default="", metavar="FLAGS", help="of `era-vllm serve`, as one word")
    add("--out", type=Path, default=Path("out"))
    add("--name", help="of the files (default: the model; with --url what it is served as)")
    arguments = parser.parse_args()
    if arguments.side is None:
        family, _ = MODELS.get(arguments.model, (SAMPLE, ""))
        arguments.side = _SIDES[family]
    return arguments


def named(arguments: argparse.Namespace, served: str) -> tuple[str, str]:
    """Return the files' name, and which model it is, dummy weights first of all.

    Args:
        arguments: The options.
        served: What the server calls its model.
    """
    if arguments.url is not None:
        name, title = re.sub(r"[^\w.-]+", "-", served).strip("-."), f"{served} at {arguments.url}"
    elif arguments.model == SAMPLE:
        name, title = SAMPLE, "the shipped sample model (4 M parameters, trained)"
    else:
        family, shape = MODELS[arguments.model]
        of, billions = FAMILIES[family], size_of(shape, family).parameters / 1e9
        name = f"dummy-{arguments.model}"
        title = f"DUMMY WEIGHTS: {billions:.2f} B {of.language} behind {of.tower}"
    return arguments.name or name, title


@contextmanager
def served(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str | None]]:
    """Yield URL and tokenizer of a server, started here unless one is named."""
    if arguments.url is not None:
        yield arguments.url.rstrip("/"), arguments.tokenizer
        return
    from era_vllm.lab import CHECKPOINT

    model, flags = str(CHECKPOINT), list(_FLAGS[SAMPLE])
    if arguments.model != SAMPLE:
        model, flags = str(folder / "model"), list(_FLAGS["dummy"])
        family, shape = MODELS[arguments.model]
        unit = FAMILIES[family].unit
        tokens = None if unit is None else max(arguments.side // unit, 1) ** 2
        make_dummy(Path(model), size_of(shape, family), family, tokens)
        context = _CONTEXT * (1 + (tokens or 0) // _CONTEXT)  # room for the question
        flags += ["--max-model-len", str(context)]
    flags += [*shlex.split(arguments.server), "--served-model-name", "loadtest"]
    command = [_ERA_VLLM, "serve", model, "--enforce-eager", *flags]
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "loadtest-server.log"
    with Server("era-vllm serve", command, {"VLLM_LOGGING_LEVEL": "WARNING"}, log) as server:
        wait_for([server])
        yield server.url, model


def sweep(
    url: str, model: str, tokenizer: str | None, arguments: argparse.Namespace, folder: Path
) -> list[dict[str, object]]:
    """Measure every level at every concurrency; the level that goes first changes each time."""
    progress("importing vLLM's benchmark client")
    from client import Asked, Client, write_requests

    about = Asked(arguments.side, arguments.video, arguments.video_side, arguments.frames)
    client = Client(url, model, tokenizer, arguments.output_tokens, arguments.goodput)
    cells: list[dict[str, object]] = []
    seed = 0
    for turn in range(-1, arguments.rounds * len(arguments.concurrency)):
        concurrency = arguments.concurrency[max(turn, 0) % len(arguments.concurrency)]
        count = max(arguments.requests, 2 * concurrency) if turn >= 0 else 2
        first = turn % len(arguments.levels)
        for level in arguments.levels[first:] + arguments.levels[:first]:
            seed += 1
            requests = write_requests(folder / "requests.jsonl", count, about, seed)
            cell = client.measure(requests, level, concurrency, count)
            if turn < 0:
                continue  # a warm-up: every level has run once
            cells.append({"round": turn // len(arguments.concurrency), **cell})
            progress(
                f"{level} at {concurrency}: {cell['rps']:.2f} requests/s, "
                f"TTFT {cell['ttft_ms']:.0f} ms, {cell['failed']} failed"
            )
    return cells


def summary(cells: Sequence[Mapping[str, object]]) -> dict[str, dict[int, dict[str, float]]]:
    """Return medians over the rounds: level -> concurrency -> measure -> value."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for cell in cells:
        same = [
            other
            for other in cells
            if (other["level"], other["concurrency"]) == (cell["level"], cell["concurrency"])
        ]
        row = {measure: median(other[measure] for other in same) for measure in MEASURES}
        found.setdefault(cell["level"], {})[cell["concurrency"]] = row
    return found


def shown(cells: Sequence[Mapping[str, object]]) -> str:
    """Return the figures as a table."""
    header = ["level", "concurrency", *(measure.replace("_", " ") for measure in MEASURES)]
    rows = [
        [level, str(concurrency), *(f"{value:.4g}" for value in row.values())]
        for level, of_level in summary(cells).items()
        for concurrency, row in of_level.items()
    ]
    return table(header, rows)


def get(url: str, path: str) -> dict[str, object]:
    """Return a JSON answer of the server.

    Raises:
        UnsupportedError: no answer, or none of ours.
    """
    headers = {"Authorization": f"Bearer {os.environ.get('API_KEY', 'none')}"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url + path, headers=headers), timeout=30) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        needs = {401: "; set API_KEY", 404: "; needed a server with era_vllm, stock vLLM has none"}
        said = f"{url}{path} answered {error.code}{needs.get(error.code, '')}"
        raise UnsupportedError(said) from error
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"{url}{path} does not answer ({error}); is it up?") from error


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _limits(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in (pair.split(":") for pair in text.split(","))}


if __name__ == "__main__":
    try:
        code = main()
    except EraError as error:
        sys.exit(f"loadtest: {error}")
    sys.stdout.flush()
    os._exit(code)  # at a normal end nanobind prints pages about what Triton has not freed
