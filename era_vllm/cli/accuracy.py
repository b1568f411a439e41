"""``era-vllm accuracy``: right answers of the real engine, policies and positions against rates.

Each question is a request of its own to vLLM, with a rate of its own; or to plain transformers.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Final

from era_vllm.cli.options import DEFAULT_MODEL
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.lab.screen import IN_PROCESS, bar, muted, progress
from era_vllm.policies import policy_names

if TYPE_CHECKING:
    from era_vllm.lab.accuracy import Accuracy
    from era_vllm.lab.asking import Asker
    from era_vllm.lab.oracle import Oracle

DESCRIPTION = """Ask held-out questions about generated pictures in the real vLLM engine.

  era-vllm accuracy                                 era and dpp, both kinds of positions (10 min)
  era-vllm accuracy --pictures 20 --policies dpp    a quick look

One engine for each policy and kind of positions; rates differ by request. Exact match counts, the
intervals are 95 % Wilson intervals over questions. The pictures suit the sample model.
"""
RATES: Final = (0.0, 0.5, 0.778, 0.889, 0.944)
MODES: Final = ("original", "compact")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add, names = parser.add_argument, f"of {', '.join(policy_names())} (default era dpp)"
    add("--model", default=DEFAULT_MODEL, help="default: the sample model")
    add("--pictures", type=int, default=130, help="4 questions each (default 130)")
    add("--seed", type=int, default=777, help="of the pictures (default 777)")
    add("--policies", nargs="+", default=["era", "dpp"], metavar="NAME", help=names)
    text = "(default 0 .5 .778 .889 .944)"
    add("--rates", nargs="+", type=float, default=RATES, metavar="R", help=text)
    add("--positions", nargs="+", choices=MODES, default=MODES, help="default: both")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    text = "ask plain transformers instead of the engine"
    add("--transformers", action="store_true", help=text)
    text = "unpruned, each kind of question and each background apart: the model card's table"
    add("--by-family", action="store_true", help=text)
    text = "at most so many a picture (default 4)"
    add("--questions", type=int, default=4, metavar="N", help=text)
    add("--backgrounds", type=Path, metavar="DIR", help="a folder of photos of your own")
    for name, text in (("merge", "merge pruned tokens"), ("bias", "add the log-bias")):
        add(f"--no-{name}", action="store_false", dest=name, help=f"do not {text}")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Measure and print a Markdown table."""
    del rest
    from era_vllm.bench.provenance import provenance
    from era_vllm.lab.accuracy import family_table, measure, table
    from era_vllm.lab.synth.dataset import generate
    from era_vllm.lab.synth.questions import FAMILIES, LEARNED_FAMILIES

    if arguments.pictures < 1:
        raise ConfigError(f"--pictures: got {arguments.pictures}, allowed: 1 or more")
    os.environ.update(IN_PROCESS)
    progress(f"painting {arguments.pictures} pictures")
    families = FAMILIES if arguments.by_family else LEARNED_FAMILIES
    pictures, seed, photos = arguments.pictures, arguments.seed, arguments.backgrounds
    examples = list(generate(pictures, seed, photos, families, arguments.questions))
    settings: dict[str, object] = {"merge": arguments.merge, "bias": arguments.bias}
    if arguments.by_family:
        with _asker_at(arguments, settings) as asker_at:
            print(family_table(examples, asker_at(0.0).ask(examples)))
        return 0
    rows: list[Accuracy] = []
    variants = list(product(arguments.policies, arguments.positions))
    settings["max_pruning_rate"] = max(*arguments.rates, 0.95)
    with bar(len(variants) * len(arguments.rates), "accuracy", "setting") as shown:
        for policy, positions in variants:
            own = {**settings, "policy": policy, "positions": positions}
            with _asker_at(arguments, own) as asker_at:
                for rate in arguments.rates:
                    rows.append(measure(asker_at(rate), examples, policy, positions, rate))
                    shown.update()
    print(table(rows))
    if arguments.json:
        figures = {**provenance(), "rows": [row.as_dict() for row in rows]}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


@cache
def _oracle(model: str) -> "Oracle":
    from era_vllm.cli.loading import open_oracle, served_dtype

    return open_oracle(model, served_dtype(model))


@contextmanager
def _asker_at(
    arguments: argparse.Namespace, settings: Mapping[str, object]
) -> "Iterator[Callable[[float], Asker]]":
    """Load the model with these settings of pruning; yield what makes an asker of a rate."""
    if arguments.transformers:
        from era_vllm.lab.asking import TransformersAsker

        oracle = _oracle(arguments.model)
        yield lambda rate: TransformersAsker(oracle, EraConfig.parse(settings), rate)
        return
    import era_vllm

    with muted():
        from era_vllm.bench.engines import EngineAsker, engine

    sizes = {"context": 1024, "kv_bytes": 256 << 20, "max_num_batched_tokens": 4096}
    with engine(era_vllm.engine_args(arguments.model, **settings), **sizes) as llm:
        yield lambda rate: EngineAsker(llm, rate)
