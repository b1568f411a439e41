"""``era-vllm accuracy``: right answers of the real engine, policies and positions against rates.

The same pictures and questions as ``python -m era_vllm.lab.accuracy``, which asks plain
transformers; here each is a request of its own to vLLM, with a rate of its own.
"""

import argparse
import json
import os
from itertools import product
from pathlib import Path
from typing import Final

from era_vllm.cli.options import DEFAULT_MODEL
from era_vllm.errors import ConfigError
from era_vllm.lab.screen import IN_PROCESS, bar, muted, progress
from era_vllm.policies import policy_names

DESCRIPTION: Final = """Ask held-out questions about generated pictures in the real vLLM engine.

  era-vllm accuracy                                 era and dpp, both kinds of positions (10 min)
  era-vllm accuracy --pictures 20 --policies dpp    a quick look

One engine for each policy and kind of positions; rates differ by request. Exact match counts, the
intervals are 95 % Wilson intervals over questions. The pictures suit the sample model.
"""
RATES: Final = (0.0, 0.5, 0.778, 0.889, 0.944)
MODES: Final = ("original", "compact")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    names = f"of {', '.join(policy_names())} (default era dpp)"
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: the sample model")
    parser.add_argument("--pictures", type=int, default=130, help="4 questions each (default 130)")
    parser.add_argument("--seed", type=int, default=777, help="of the pictures (default 777)")
    parser.add_argument("--policies", nargs="+", default=["era", "dpp"], metavar="NAME", help=names)
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=RATES,
        metavar="R",
        help="(default 0 .5 .778 .889 .944)",
    )
    parser.add_argument(
        "--positions", nargs="+", choices=MODES, default=MODES, help="default: both"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Measure and print a Markdown table."""
    del rest
    import era_vllm
    from era_vllm.bench.provenance import provenance
    from era_vllm.lab.accuracy import Accuracy, measure, table
    from era_vllm.lab.synth.dataset import generate

    if arguments.pictures < 1:
        raise ConfigError(f"--pictures: got {arguments.pictures}, allowed: 1 or more")
    os.environ.update(IN_PROCESS)
    progress(f"painting {arguments.pictures} pictures")
    examples = list(generate(arguments.pictures, seed=arguments.seed))
    with muted():
        from era_vllm.bench.engines import EngineAsker, engine
    rows: list[Accuracy] = []
    engines = list(product(arguments.policies, arguments.positions))
    with bar(len(engines) * len(arguments.rates), "accuracy", "setting") as shown:
        for policy, positions in engines:
            settings = era_vllm.engine_args(
                arguments.model,
                policy=policy,
                positions=positions,
                max_pruning_rate=max(*arguments.rates, 0.95),
            )
            sizes = {"context": 1024, "kv_bytes": 256 << 20, "max_num_batched_tokens": 4096}
            with engine(settings, **sizes) as llm:
                for rate in arguments.rates:
                    asker = EngineAsker(llm, rate)
                    rows.append(measure(asker, examples, policy, positions, rate))
                    shown.update()
    print(table(rows))
    if arguments.json:
        figures = {**provenance(), "rows": [row.as_dict() for row in rows]}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0
