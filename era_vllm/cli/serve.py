"""``era-vllm serve``: vLLM's OpenAI server with pruning switched on; takes every vLLM flag."""

import argparse
import json

from era_vllm.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_NAME,
    add_era_options,
    era_settings,
    refuse_unknown_era_flags,
)
from era_vllm.errors import ConfigError

DESCRIPTION = """Run vLLM's own OpenAI server with visual tokens pruned.

  era-vllm serve                                    the sample model on port 8000
  era-vllm serve llava-hf/llava-1.5-7b-hf --era-pruning-rate 0.889
  era-vllm serve MODEL --max-model-len 4096 --tensor-parallel-size 2   any flag of `vllm serve`
  era-vllm serve MODEL --print-command              the plain `vllm serve` line that does the same
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "serve",
        help="run the OpenAI server with pruning on",
        description=DESCRIPTION,
        epilog="All other flags go to vLLM: `vllm serve --help=all` lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help="model name or path (default: the sample)"
    )
    add_era_options(parser)
    parser.add_argument(
        "--print-command", action="store_true", help="print the `vllm serve` line and stop"
    )
    # Merged with ours, so they are read here and not by vLLM.
    parser.add_argument("--hf-overrides", type=_json_object, help=argparse.SUPPRESS)
    parser.add_argument("--additional-config", type=_json_object, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer-mode", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Serve until stopped, or print the command."""
    from era_vllm.vllm_plugin.launch import plan

    refuse_unknown_era_flags(rest)
    if arguments.model == DEFAULT_MODEL and "--served-model-name" not in rest:
        rest = [*rest, "--served-model-name", DEFAULT_NAME]
    launch = plan(
        arguments.model,
        era_settings(arguments),
        hf_overrides=arguments.hf_overrides,
        additional_config=arguments.additional_config,
    )
    asked = arguments.tokenizer_mode
    if asked not in (None, "auto") and "tokenizer_mode" in launch.engine:
        raise ConfigError(
            f"--tokenizer-mode: got {asked!r}, but pruning uses its own renderer over vLLM's "
            "'hf' one; leave the flag out"
        )
    if asked is not None and "tokenizer_mode" not in launch.engine:
        rest = [*rest, "--tokenizer-mode", asked]
    if arguments.print_command:
        print(launch.command(rest))
        return 0
    from era_vllm_server.app import serve

    serve(launch, rest)
    return 0


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, needed a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"got {text!r}, needed a JSON object")
    return value
