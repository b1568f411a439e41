"""READ FIRST: builds vLLM's own OpenAI server with our arguments and runs it in this process tree.

vLLM parses the flags, builds the FastAPI app and runs it under uvicorn, with as many API servers
and engine processes as the flags say. Works where the ``vllm`` script does not (the CPU wheel's
dies on its distribution name), and is the same code on a GPU. Routes of ours are not here.

Upstream: vllm/entrypoints/cli/serve.py ``ServeSubcommand`` and vllm/entrypoints/cli/main.py, which
does the same three steps (0.32.0). Remove when ``vllm serve`` starts on every wheel.
"""

import os
from collections.abc import Sequence

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser

from era_vllm.errors import UnsupportedError
from era_vllm.vllm_plugin.launch import Launch


def serve(launch: Launch, rest: Sequence[str] = ()) -> None:
    """Serve until stopped.

    Args:
        launch: Model, vLLM arguments and environment that switch pruning on.
        rest: Further flags of ``vllm serve``, as typed.

    Raises:
        UnsupportedError: ``VLLM_USE_RUST_FRONTEND``, whose renderer is not ours.
    """
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise UnsupportedError(
            "VLLM_USE_RUST_FRONTEND replaces the Python front end that decides pruning rates; "
            "unset it"
        )
    os.environ.update(launch.environment)
    run([launch.model, *launch.flags(), *rest])


def run(arguments: Sequence[str]) -> None:
    """Do what ``vllm serve ARGUMENTS`` does."""
    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args([command.name, *arguments])
    command.validate(parsed)
    command.cmd(parsed)
