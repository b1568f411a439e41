"""``era-vllm``: the subcommands. Errors of ours end in one line, not a traceback.

A subcommand's file is imported where it is the one that is run: a help waits for no torch or vLLM.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from era_vllm import __version__
from era_vllm.errors import EraError

DESCRIPTION = """Serve vision-language models in vLLM with a fraction of their visual tokens.

  era-vllm doctor                        is everything in place? (start here)
  era-vllm serve                         OpenAI server with the sample model, 78 % pruned
  era-vllm inspect photo.png             a picture of the tokens that are kept
  era-vllm demo                          two servers, a dozen pictures, both answers
  era-vllm calibrate                     how much of the log-bias each layer takes
  era-vllm recommend MODEL photos        how much can be pruned of pictures of your own
  era-vllm eval                          right answers by family, with intervals
  era-vllm bench serve                   time against stock vLLM, and where it goes
  era-vllm sample-model smol             assemble a LLaVA on a real decoder (93 MB to fetch)
  era-vllm train --arch qwen3_vl --out run      train a small model (hours)
"""
COMMANDS: Final = {
    "serve": "run the OpenAI server with pruning on",
    "inspect": "draw the tokens that are kept of an image",
    "doctor": "check versions, plugin, model, and one live answer",
    "demo": "show answers with and without pruning, and the speed",
    "calibrate": "measure how much of the bias each layer takes",
    "ecl": "find the layer where visual tokens' matrix entropy collapses",
    "recommend": "find the pruning rate for pictures of your own",
    "eval": "measure accuracy under pruning, by family of questions",
    "bench": "measure what pruning costs and saves",
    "sample-model": "assemble a model that is too large to ship",
    "train": "train a small model on generated pictures",
}
"""A module of this folder each (``DESCRIPTION``, ``add_options``, ``run``), and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="era-vllm",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"era-vllm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if name != next(iter(argv), None):
            commands.add_parser(name, help=summary)
            continue
        module = import_module(f"era_vllm.cli.{name.replace('-', '_')}")
        of_command = commands.add_parser(
            name,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **getattr(module, "PARSER", {}),
        )
        of_command.set_defaults(run=module.run)
        module.add_options(of_command)
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest  # vLLM's
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"\nera-vllm {arguments.command}: stopped", file=sys.stderr)
        return 130
    except EraError as error:
        print(f"era-vllm {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
