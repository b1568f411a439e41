"""The live check of ``era-vllm doctor``: engine and oracle asked the same, told as findings.

Leaves out the engine (``live_engine.py``) and the comparison (``lab/check.py``).
"""

from collections.abc import Iterator, Mapping
from typing import Final

import torch

from era_vllm.cli.findings import Finding, Layout
from era_vllm.cli.loading import lacking_memory, open_oracle
from era_vllm.cli.quiet import muted, progress
from era_vllm.config import DEFAULT_PRUNING_RATE, EraConfig
from era_vllm.lab.check import CONTROL_FACTOR, Check, compare
from era_vllm.lab.samples import load_samples

SECTION: Final = "Live check"


def live_check(
    model: str, arguments: Mapping[str, object], config: EraConfig, layout: Layout
) -> Iterator[Finding]:
    """Ask a real engine and plain transformers about one picture.

    Args:
        model: Checkpoint folder or name.
        arguments: What ``vllm.LLM`` is given.
        config: The same settings, parsed.
        layout: Sizes of the pruned model.
    """
    if lacking := _lacking_memory(model):
        advice = "leave the check out with --no-check, or run it where there is more memory"
        yield Finding(SECTION, "memory", lacking, advice)
        return
    sample = load_samples()[0]
    question = sample.questions[0].text
    rate = config.pruning_rate or min(DEFAULT_PRUNING_RATE, config.max_pruning_rate)
    progress("starting an engine and asking it about one picture (half a minute)")
    with muted():
        from era_vllm.cli.live_engine import live_answer

        answer, built = live_answer(
            arguments, sample.image, question, rate, layout.image_tokens, layout.bytes_per_token
        )
    progress("asking plain transformers the same")
    with muted():
        result = compare(open_oracle(model), answer, sample.image, config, rate)
    kept = len(answer.segment.anchors)
    yield Finding(SECTION, "asked", f"{sample.file}: {question}")
    yield Finding(
        SECTION,
        "engine",
        f"float32, eager; {built.layers} layers with heads of {built.head_size} in "
        f"{built.backend}; kept {kept} of {layout.image_tokens} image tokens",
    )
    yield from verdict(result, kept)


def verdict(result: Check, kept: int) -> Iterator[Finding]:
    """Tell what a comparison found.

    Args:
        result: The comparison.
        kept: K.
    """
    same = f"the same {kept} as plain transformers chooses from features of its own"
    other = "not all those that plain transformers chooses: near-ties decided by a last bit"
    yield Finding(SECTION, "anchors", same if result.same_anchors else other)
    yield Finding(
        SECTION,
        "with bias",
        f"{result.difference:.1e}: largest log-probability difference from plain transformers, "
        f"{result.positions} positions (prompt, {result.positions - 1} decode steps) x "
        f"{result.vocabulary} tokens; allowed {result.tolerance:g}",
        ""
        if result.exact
        else "answers of this installation are wrong; do not serve with it. Is another plugin or "
        "an untested vLLM loaded? Report it with this page (era-vllm doctor --json)",
    )
    if result.without_bias is None:
        text = "not applicable: every bias is 0 with these settings"
        yield Finding(SECTION, "without bias", text)
        return
    needed = CONTROL_FACTOR * result.tolerance
    yield Finding(
        SECTION,
        "without bias",
        f"{result.without_bias:.1e}: the control, same without the bias; needed {needed:g} or more",
        ""
        if result.control_fails
        else "the check cannot see the bias with these settings, so it proves nothing; run it with "
        "a higher --era-pruning-rate",
    )


def _lacking_memory(model: str) -> str:
    from vllm.platforms import current_platform

    with muted():
        copies = 2 if current_platform.is_cpu() else 1  # the engine's is on the GPU
        return lacking_memory(model, torch.float32, copies)
