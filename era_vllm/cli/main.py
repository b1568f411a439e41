"""``era-vllm``: the subcommands. Errors of ours end in one line, not a traceback."""

import argparse
import sys
from collections.abc import Sequence

from era_vllm import __version__
from era_vllm.cli import accuracy, bench, demo, doctor, inspect, serve
from era_vllm.errors import EraError

DESCRIPTION = """Serve vision-language models in vLLM with a fraction of their visual tokens.

  era-vllm doctor                        is everything in place? (start here)
  era-vllm serve                         OpenAI server with the sample model, 78 % pruned
  era-vllm inspect photo.png             a picture of the tokens that are kept
  era-vllm demo                          two servers, a dozen pictures, both answers
  era-vllm accuracy                      right answers of the engine, policies against rates
  era-vllm bench serve                   time against stock vLLM, and where it goes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="era-vllm",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"era-vllm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (serve, inspect, doctor, demo, accuracy, bench):
        module.add_parser(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.run(arguments, rest)
    except EraError as error:
        print(f"era-vllm {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
