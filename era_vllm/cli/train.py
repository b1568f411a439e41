"""``era-vllm train``: train one of the small models on generated pictures, and export it.

Leaves out the loop (``lab/train/loop.py``).
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Final

from era_vllm.cli.preflight import check_least, check_out
from era_vllm.errors import ConfigError
from era_vllm.lab.train import ARCHS

DESCRIPTION: Final = """Train a small model on generated pictures: on two CPU cores, or on a GPU.

  era-vllm train --arch qwen3_vl --out run --minutes 120 --ranks 2     begin (two cores)
  era-vllm train --arch qwen3_vl --out run --minutes 60 --ranks 2 --resume   go on
  era-vllm train --arch qwen3_vl --out run --minutes 30 --resume --cooldown 30    end well
  era-vllm train --arch qwen3_vl --out new --minutes 30 --weights run/export    from weights alone
  era-vllm train --arch smol --out smol --minutes 60 --ranks 2    a LLaVA on SmolLM2 (fetches 93 MB)

OUT holds state.pt (weights, their average, optimizers, step: what --resume goes on from; the one
before is kept), curve.jsonl and curve.png (losses, and held-out answers by family), and export, the
folder that transformers and vLLM load, with averaged weights in bfloat16. All three are written
anew every few minutes and at the end. Ctrl-C ends a training after its step, with all saved.

A task is a function of --seed and its number: the same command gives the same losses, and --resume
goes on where the training was. Ranks share a step, so their number belongs to the command.
"""
_DEVICES: Final = ("cpu", "cuda")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    text = "qwen3_vl: several pictures, video; llava: the shipped one (a picture); smol: on SmolLM2"
    add("--arch", choices=ARCHS, required=True, help=text)
    add("--out", type=Path, required=True, metavar="DIR", help="made if it is not there")
    text = "of training, from now on (default 60); pauses do not count"
    add("--minutes", type=float, default=60.0, metavar="M", help=text)
    add("--steps", type=int, metavar="N", help="end after N steps, if that is sooner")
    add("--seed", type=int, default=0, help="of weights and pictures (default 0)")
    text = "processes that train one model together (default 1); one a core is fastest on a CPU"
    add("--ranks", type=int, default=1, metavar="N", help=text)
    add("--threads", type=int, default=1, metavar="N", help="of a rank (default 1)")
    add("--lr", type=float, default=2e-3, help="learning rate (default 0.002)")
    text = "let the learning rate fall to a twentieth over the last M minutes (default 0)"
    add("--cooldown", type=float, default=0.0, metavar="M", help=text)
    add("--resume", action="store_true", help="go on with the training in OUT")
    text = "begin with the weights of an exported folder; optimizers, counts and heads are new"
    add("--weights", type=Path, metavar="DIR", help=text)
    text = "leave out tasks that the tower learns alone from, and small pictures"
    add("--from-text", action="store_true", help=text)
    add("--save-every", type=float, default=5.0, metavar="M", help="minutes (default 5)")
    text = "ask held-out questions every M minutes (default 15)"
    add("--dev-every", type=float, default=15.0, metavar="M", help=text)
    add("--device", choices=_DEVICES, default="cpu", help="default cpu; cuda takes one rank")
    text = "bfloat16 matrix products (a GPU, or a CPU with AMX; elsewhere much slower)"
    add("--bf16", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Train until the time is over."""
    _check(arguments)
    check_out(arguments.out)
    from era_vllm.lab.train.loop import Settings, train

    own = {one.name for one in fields(Settings)}
    train(Settings(**{name: of for name, of in vars(arguments).items() if name in own}))
    print(f"model: {arguments.out / 'export'}; go on with --resume")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    check_least(arguments, minutes=0, ranks=1, threads=1, cooldown=0, steps=1)
    check_least(arguments, save_every=0.1, dev_every=0.1)
    if not 0 < arguments.lr <= 0.1:
        raise ConfigError(f"--lr: got {arguments.lr:g}, allowed: above 0, at most 0.1")
    if arguments.resume and arguments.weights:
        raise ConfigError("--resume and --weights: choose one; --resume has weights of its own")
    if arguments.weights:
        _check_weights(arguments.weights, arguments.arch)
    if (arguments.out / "state.pt").exists() and not arguments.resume:
        raise ConfigError(
            f"--out: {str(arguments.out)!r} holds a training; go on with it (--resume) or name "
            "another folder"
        )
    if arguments.resume and not (arguments.out / "state.pt").exists():
        raise ConfigError(
            f"--resume: no state.pt in {str(arguments.out)!r}; name a folder that era-vllm train "
            "wrote to, or begin with weights alone (--weights)"
        )
    if arguments.device == "cuda" and arguments.ranks > 1:
        raise ConfigError(f"--ranks: got {arguments.ranks}, allowed with --device cuda: 1")
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device: got cuda, allowed here: cpu (torch finds no GPU)")


def _check_weights(folder: Path, arch: str) -> None:
    from era_vllm.lab.train.arch import architecture

    needed = architecture(arch).weights_file
    if not (folder / needed).is_file():
        raise ConfigError(
            f"--weights: no {needed} in {str(folder)!r}; name a folder that era-vllm train "
            f"--arch {arch} exported"
        )
    if needed == "config.json":
        try:
            found = json.loads((folder / needed).read_text()).get("model_type")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"--weights: {str(folder / needed)!r} is no config") from error
        if found != arch:
            raise ConfigError(f"--weights: {str(folder)!r} is of --arch {found}, got {arch}")
