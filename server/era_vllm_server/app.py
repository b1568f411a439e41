"""READ FIRST: builds vLLM's own OpenAI server with our arguments and runs it in this process tree.

vLLM parses the flags, builds the FastAPI app and runs it under uvicorn, with as many API servers
and engine processes as the flags say. Works where the ``vllm`` script does not (the CPU wheel's
dies on its distribution name), and is the same code on a GPU. Routes of ours are not here.

Upstream: vllm/entrypoints/cli/serve.py ``ServeSubcommand`` and vllm/entrypoints/cli/main.py, which
does the same three steps (0.32.0). Remove when ``vllm serve`` starts on every wheel.
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from vllm.utils.argparse_utils import FlexibleArgumentParser

from era_vllm.compat.vllm_entrypoints import (
    H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT,
    ServeSubcommand,
    cli_env_setup,
)
from era_vllm.errors import ConfigError
from era_vllm.vllm_plugin.launch import Launch
from era_vllm.vllm_plugin.register import end_together


def serve(launch: Launch, arguments: Sequence[str]) -> int:
    """Serve by what ``complete`` returned until stopped; returns the exit code."""
    os.environ.update(launch.environment)
    return run(arguments)


def run(arguments: Sequence[str]) -> int:
    """Do what ``vllm serve ARGUMENTS`` does.

    Returns:
        The exit code: 1 where the engine ended by itself, for whoever is to start us anew.
    """
    cli_env_setup()
    end_together()  # the plugin came before the variables that say whose server it is
    command, parsed = _parsed(arguments)
    command.validate(parsed)
    command.cmd(parsed)
    return int(getattr(parsed, "era_engine_failed", False))


def print_help(word: str) -> None:
    """Print vLLM's flags that have a word in their name, a group of them, or ``all``."""
    try:
        _parsed([f"--help={word}"])
    except SystemExit:  # argparse's way to end after a help
        return


def user_flags(arguments: Sequence[str]) -> Namespace:
    """Read with vLLM's own parser what a user's flags say, which ours are merged with.

    ``model`` is None where none is named, and so is ``h11_max_incomplete_event_size``.

    Raises:
        ConfigError: vLLM's parser raised, as where flags come without the model that they need.
    """
    _, parsed = _parsed(arguments, model=None)  # not the model that vLLM takes if none is named
    if parsed.model_tag is not None:  # else that of a --config file
        parsed.model = parsed.model_tag
    if parsed.h11_max_incomplete_event_size == H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT:
        parsed.h11_max_incomplete_event_size = None
    return parsed


def complete(launch: Launch, rest: Sequence[str]) -> list[str]:
    """Return the words behind ``vllm serve``, once vLLM's parser reads from them what we mean.

    Raises:
        ConfigError: a flag of the user's, who typed ``rest``, replaces one of ours.
    """
    arguments = launch.arguments(rest)
    _, parsed = _parsed(arguments)
    for name, value in launch.engine.items():
        if (found := getattr(parsed, name)) != value:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag}: vLLM reads {found!r} from all flags together, but pruning needs "
                f"{value!r}; write yours in full as {flag} '{{...}}', not abbreviated or dotted "
                "in a file"
            )
    return arguments


def _parsed(arguments: Sequence[str], **defaults: object) -> tuple[ServeSubcommand, Namespace]:
    parser = FlexibleArgumentParser(prog="era-vllm")
    command = ServeSubcommand()
    serve = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve.set_defaults(**defaults)

    def refuse(message: str) -> NoReturn:  # argparse prints the usage and exits
        word = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        near = get_close_matches(word, serve._option_string_actions, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ConfigError(f"{message}{hint} `era-vllm serve --help=WORD` lists vLLM's flags")

    parser.error = serve.error = refuse
    try:
        return command, parser.parse_args([command.name, *arguments])
    except (ValueError, IndexError, OSError) as error:  # what it lets through from its own steps
        raise ConfigError(f"vLLM cannot read the flags: {error}") from error
