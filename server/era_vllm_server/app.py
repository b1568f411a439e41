"""READ FIRST: builds vLLM's own OpenAI server with our arguments and runs it in this process tree.

vLLM parses the flags, builds the FastAPI app and runs it under uvicorn, with as many API servers
and engine processes as the flags say. Works where the ``vllm`` script does not (the CPU wheel's
dies on its distribution name), and is the same code on a GPU. Routes of ours are not here.

Upstream: vllm/entrypoints/cli/serve.py ``ServeSubcommand`` and vllm/entrypoints/cli/main.py, which
does the same three steps (0.32.0). Remove when ``vllm serve`` starts on every wheel.
"""

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser

from era_vllm.errors import UnsupportedError
from era_vllm.vllm_plugin.launch import Launch


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user's own vLLM flags say about things that pruning sets too."""

    model: str
    model_given: bool
    hf_overrides: Mapping[str, object]
    additional_config: Mapping[str, object]
    tokenizer_mode: str


def serve(launch: Launch, rest: Sequence[str]) -> None:
    """Serve until stopped.

    Args:
        launch: vLLM arguments and environment that switch pruning on.
        rest: Model and further flags of ``vllm serve``, as typed; ours come last and win.

    Raises:
        UnsupportedError: ``VLLM_USE_RUST_FRONTEND``, whose renderer is not ours.
    """
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise UnsupportedError(
            "VLLM_USE_RUST_FRONTEND replaces the Python front end that decides pruning rates; "
            "unset it"
        )
    os.environ.update(launch.environment)
    run([*rest, *launch.flags()])


def run(arguments: Sequence[str]) -> None:
    """Do what ``vllm serve ARGUMENTS`` does."""
    cli_env_setup()
    command, parsed = _parsed(arguments)
    command.validate(parsed)
    command.cmd(parsed)


def asked(arguments: Sequence[str], default_model: str) -> Asked:
    """Read, with vLLM's own parser, those flags that ours are merged with."""
    _, parsed = _parsed(arguments)
    return Asked(
        model=parsed.model_tag or default_model,
        model_given=parsed.model_tag is not None,
        hf_overrides=parsed.hf_overrides,
        additional_config=parsed.additional_config,
        tokenizer_mode=parsed.tokenizer_mode,
    )


def _parsed(arguments: Sequence[str]) -> tuple[ServeSubcommand, Namespace]:
    parser = FlexibleArgumentParser(prog="era-vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    return command, parser.parse_args([command.name, *arguments])
