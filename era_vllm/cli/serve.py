"""``era-vllm serve``: vLLM's OpenAI server with pruning switched on; takes every vLLM flag."""

import argparse
import os
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Final

from era_vllm.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_NAME,
    add_era_options,
    era_settings,
    era_variables,
    refuse_unknown_era_flags,
)
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.vllm_plugin.version import check_vllm_version
from era_vllm_server.settings import (
    ServerSettings,
    add_server_options,
    flag,
    refuse_unknown_variables,
    server_flags,
)

DEFAULT_KV_CACHE: Final = "1G"
"""Of the sample model: about a hundred of its longest requests. vLLM would take most of the memory
for a model of 8 MB, and not start where a neighbour uses some of it."""
_WHY_PLUGINS: Final = """\
# VLLM_PLUGINS: vLLM serves routes of plugins only where it names them, and then loads no others.
# So it names era, and beside it what vLLM loads here by itself."""

DESCRIPTION: Final = """Run vLLM's own OpenAI server with visual tokens pruned.

  era-vllm serve                                    the sample model on port 8000
  era-vllm serve llava-hf/llava-1.5-7b-hf --era-pruning-rate 0.889
  era-vllm serve MODEL --max-model-len 4096 --tensor-parallel-size 2   any flag of `vllm serve`
  era-vllm serve MODEL --print-command              the plain `vllm serve` line that does the same
"""
PARSER: Final = {
    "usage": "era-vllm serve [MODEL] [--era-* ...] [any flag of vllm serve]",
    "epilog": "All other flags go to vLLM: `era-vllm serve --help=all` lists them,\n"
    "`era-vllm serve --help=WORD` those with that word in their names.",
    "add_help": False,
}
"""How the parser differs from that of the other subcommands."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add our own flags; all others are vLLM's."""
    parser.add_argument(
        "-h", "--help", nargs="?", action=_Help, metavar="WORD", help="this text, or vLLM's"
    )
    add_era_options(parser)
    add_server_options(parser)
    parser.add_argument(
        "--print-command", action="store_true", help="print the `vllm serve` line and stop"
    )


class _Help(argparse.Action):
    """Print our own flags at once; leave a word to look for to vLLM's parser."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if values is None:
            parser.print_help()
            parser.exit()
        namespace.help = values


def run(arguments: argparse.Namespace) -> int:
    """Serve until stopped, or print the command."""
    check_vllm_version()
    from vllm.envs import VLLM_CACHE_ROOT

    from era_vllm.cli.preflight import check_address, check_folders
    from era_vllm.vllm_plugin.launch import plan
    from era_vllm_server.app import complete, print_help, serve, user_flags
    from era_vllm_server.front import with_front

    if arguments.help:
        print_help(arguments.help)
        return 0

    rest: list[str] = arguments.rest
    refuse_unknown_era_flags(rest, [flag(name) for name in ServerSettings.model_fields])
    refuse_unknown_variables(era_variables())
    settings = ServerSettings.parse(server_flags(arguments))
    refuse_era_in_files(rest)
    rest = with_model(rest)
    user = user_flags(rest)
    launch = plan(
        user.model,
        for_chat_template(era_settings(arguments, os.environ), user),
        hf_overrides=user.hf_overrides,
        additional_config=user.additional_config,
        server=True,
    )
    if "tokenizer_mode" in launch.engine and user.tokenizer_mode not in ("auto", "hf"):
        raise ConfigError(
            f"--tokenizer-mode: got {user.tokenizer_mode!r}, but pruning uses a renderer of its "
            "own over vLLM's 'hf' one; leave the flag out"
        )
    launch, rest = with_front(launch, rest, settings, user)
    words = complete(launch, rest)
    if arguments.print_command:
        print(launch.command(words))
        if "VLLM_PLUGINS" in launch.environment:
            print(_WHY_PLUGINS, file=sys.stderr)
        return 0
    check_folders(VLLM_CACHE_ROOT)
    if not user.headless:
        check_address(user.host, user.port, user.uds)
    for name in era_variables() & os.environ.keys():
        del os.environ[name]  # said by flags now; the server's processes refuse them as unknown
    return serve(launch, words)


def for_chat_template(settings: dict[str, object], user: argparse.Namespace) -> dict[str, object]:
    """Return settings whose scout knows the user's own ``--chat-template``, if there are both.

    Raises:
        ConfigError: a setting, a template that cannot be read, or nothing worked out from it.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMValidationError

    from era_vllm.vllm_plugin.scout_text import layers_read, with_text

    if user.chat_template is None:
        return settings
    config = EraConfig.parse(
        {name: value for name, value in settings.items() if name != "calibration"}
    )
    if not layers_read(config):
        return settings
    try:
        model_config = EngineArgs.from_cli_args(user).create_model_config()
        config = with_text(model_config, config, user.chat_template)
    except (ValueError, VLLMValidationError) as error:
        raise ConfigError(f"--chat-template with a scout: {error}") from error
    found = {name: getattr(config, name) for name in ("scout_prefix", "scout_suffix")}
    return settings | {name: list(ids) for name, ids in found.items() if ids is not None}


def refuse_era_in_files(rest: list[str]) -> None:
    """Raise ConfigError for our settings in a ``--config`` file, which is vLLM's."""
    import yaml

    for word, following in zip_longest(rest, rest[1:], fillvalue=""):
        flag, _, value = word.partition("=")
        if flag == "--config" and (path := Path(value or following)).is_file():
            try:
                said = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, OSError, UnicodeDecodeError):
                return  # vLLM's to say
            for name in said if isinstance(said, dict) else ():
                if str(name).replace("_", "-").startswith("era-"):
                    raise ConfigError(
                        f"{path}: got {name!r}, but the file is vLLM's; give --{name} as a flag, "
                        f"or {str(name).replace('-', '_').upper()} as a variable"
                    )


def with_model(rest: list[str]) -> list[str]:
    """Return the flags as typed, or in front of them the sample model, if they name none.

    That one comes with a name and a KV cache of its size, where the flags do not say otherwise.
    """
    from era_vllm_server.app import user_flags

    try:
        if user_flags(rest).model is not None:
            return rest
    except ConfigError:  # with some flags vLLM demands a model in front; read on with ours there
        pass
    rest = [DEFAULT_MODEL, *rest]
    user = user_flags(rest)
    if user.served_model_name is None:
        rest += ["--served-model-name", DEFAULT_NAME]
    if user.kv_cache_memory_bytes is None:
        rest += ["--kv-cache-memory-bytes", DEFAULT_KV_CACHE]
    return rest
