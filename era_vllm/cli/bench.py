"""``era-vllm bench``: what pruning costs and saves, measured; figures as JSON and a picture.

Leaves out the benchmarks (``bench_reducer.py``, ``bench_attention.py``, ``bench_serve.py``,
``bench_gap.py``).
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from era_vllm.cli import bench_attention, bench_gap, bench_reducer, bench_serve
from era_vllm.cli.quiet import progress
from era_vllm.errors import ConfigError, UnsupportedError

DESCRIPTION: Final = """Measure what pruning costs and what it saves, on this machine.

  era-vllm bench reducer      the pruning step alone, its growth, against the vision tower
  era-vllm bench attention    the widened attention layer against vLLM's own; KV blocks
  era-vllm bench serve        first token, decode and encoder against stock vLLM and a bound
  era-vllm bench gap          the longest pause of a running stream while pictures arrive

One run measures all sides in interleaved rounds and reports medians and 90th percentiles; weights
are dummies of a real model's shape. With a GPU everything runs there, without one on the CPU.
"""
_BENCHES: Final = {
    "reducer": (bench_reducer, "the pruning step alone"),
    "attention": (bench_attention, "the widened attention layer"),
    "serve": (bench_serve, "requests to engines side by side"),
    "gap": (bench_gap, "what a stream waits for while pictures arrive"),
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand and its own."""
    parser = commands.add_parser(
        "bench",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    for name, (module, summary) in _BENCHES.items():
        kind = kinds.add_parser(
            name,
            help=summary,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_options(kind)
        kind.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Measure, print the page, write the figures."""
    del rest
    module, _ = _BENCHES[arguments.bench]
    if find_spec("matplotlib") is None:
        raise UnsupportedError("bench: matplotlib is missing; pip install 'era-vllm[lab]'")
    if module is not bench_reducer and find_spec("vllm") is None:
        from era_vllm.cli.findings import INSTALL

        raise UnsupportedError(f"bench: vLLM is not installed; needed 0.32.x: {INSTALL}")
    started = time.monotonic()
    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # now rather than after minutes of measuring
    except OSError as error:
        raise ConfigError(
            f"--out: got {arguments.out!r}, which cannot be written to ({error.strerror}); needed "
            "a folder, or the name of a new one"
        ) from error
    try:
        report = module.run(arguments)
    except KeyboardInterrupt:
        print("\nera-vllm bench: stopped; nothing written", file=sys.stderr)
        return 130
    from era_vllm.cli.provenance import provenance

    command = shlex.join(["era-vllm", *sys.argv[1:]])
    document = report.as_dict(provenance(), command, module.settings(arguments))
    document["seconds"] = round(time.monotonic() - started)
    file = out / f"bench-{arguments.bench}.json"
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"{document['hardware']}, torch {document['versions']['torch']}")
    print(report.text())
    progress(f"all figures: {file}, drawn: {file.with_suffix('.png')}; {document['seconds']} s")
    return 0
