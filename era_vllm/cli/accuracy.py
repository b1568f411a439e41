"""``era-vllm accuracy``: right answers of the real engine, policies and positions against rates.

The same pictures and questions as ``python -m era_vllm.lab.accuracy``, which asks plain
transformers; here each is a request of its own to vLLM, with a rate of its own.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from era_vllm.cli.options import DEFAULT_MODEL
from era_vllm.cli.quiet import QUIET, muted, progress
from era_vllm.errors import ConfigError
from era_vllm.policies import policy_names

if TYPE_CHECKING:
    from era_vllm.lab.accuracy import Accuracy
    from era_vllm.lab.data import Example

DESCRIPTION = """Ask held-out questions about generated pictures in the real vLLM engine.

  era-vllm accuracy                                 era and dpp, both kinds of positions (10 min)
  era-vllm accuracy --pictures 20 --policies dpp    a quick look

One engine for each policy and kind of positions; rates differ by request. Exact match counts, the
intervals are 95 % Wilson intervals over questions. The pictures suit the sample model.
"""
RATES = (0.0, 0.5, 0.778, 0.889, 0.944)
MODES = ("original", "compact")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "accuracy",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: the sample model")
    parser.add_argument("--pictures", type=int, default=130, help="4 questions each (default 130)")
    parser.add_argument("--seed", type=int, default=777, help="of the pictures (default 777)")
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["era", "dpp"],
        metavar="NAME",
        help=f"of {', '.join(policy_names())} (default era dpp)",
    )
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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Measure and print a Markdown table."""
    del rest
    from era_vllm.lab.accuracy import table
    from era_vllm.lab.data import LEARNED_FAMILIES, generate
    from era_vllm.lab.progress import bar

    if arguments.pictures < 1:
        raise ConfigError(f"--pictures: got {arguments.pictures}, allowed: 1 or more")
    os.environ.update(QUIET)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    progress(f"painting {arguments.pictures} pictures")
    examples = list(generate(arguments.pictures, seed=arguments.seed, families=LEARNED_FAMILIES))
    rows: list[Accuracy] = []
    engines = list(product(arguments.policies, arguments.positions))
    with bar(len(engines) * len(arguments.rates), "accuracy", "setting") as shown:
        for policy, positions in engines:
            for row in _measure(arguments.model, examples, policy, positions, arguments.rates):
                rows.append(row)
                shown.update()
    print(table(rows))
    if arguments.json:
        from era_vllm.cli.provenance import provenance

        figures = [{**asdict(row), "interval": row.interval} for row in rows]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**provenance(), "rows": figures}, indent=1) + "\n")
    return 0


def _measure(
    model: str, examples: "Sequence[Example]", policy: str, positions: str, rates: Sequence[float]
) -> "list[Accuracy]":
    """Ask everything at every rate in one engine."""
    import era_vllm
    from era_vllm.lab.accuracy import Accuracy

    settings = era_vllm.engine_args(
        model, policy=policy, positions=positions, max_pruning_rate=max(*rates, 0.95)
    )
    with muted():
        from vllm import LLM, SamplingParams

        llm = LLM(
            **settings,
            enforce_eager=True,
            max_model_len=1024,
            max_num_batched_tokens=4096,
            kv_cache_memory_bytes=256 << 20,
            limit_mm_per_prompt={"image": 1},
        )
    sampling = SamplingParams(max_tokens=8, temperature=0)
    asked = [(example.image, question) for example in examples for question in example.questions]
    rows: list[Accuracy] = []
    try:
        for rate in rates:
            prompts = [
                {
                    "prompt": f"USER: <image> {question.text} ASSISTANT:",
                    "multi_modal_data": {"image": image},
                    "mm_processor_kwargs": {"era": [rate]},
                }
                for image, question in asked
            ]
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            texts = [output.outputs[0].text.strip() for output in outputs]
            right = sum(
                text == question.answer for text, (_, question) in zip(texts, asked, strict=True)
            )
            image_token = llm.model_config.hf_config.image_token_index
            tokens = outputs[0].prompt_token_ids.count(image_token)
            rows.append(Accuracy(policy, positions, rate, tokens, right, len(asked)))
    finally:
        llm.llm_engine.engine_core.shutdown()
    return rows
