"""The live check of ``era-vllm doctor``: engine and oracle asked the same, told as findings.

The engine is float32 and eager, with a KV cache just large enough, so that it starts in seconds
and can be compared with plain transformers. vLLM reads its environment as it is imported, so this
module is imported after setting it. Leaves out the comparison (``check.py``).
"""

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from PIL.Image import Image
from vllm import SamplingParams
from vllm.platforms import current_platform

from era_vllm.attention.layer import RectifiedAttention
from era_vllm.bench.engines import engine
from era_vllm.bench.taken import Taken
from era_vllm.cli.doctor.check import CONTROL_FACTOR, TOLERANCE, Check, EngineAnswer, compare
from era_vllm.cli.doctor.findings import LIVE, Finding, Layout
from era_vllm.cli.loading import lacking_memory, open_language_oracle
from era_vllm.config import DEFAULT_PRUNING_RATE, EraConfig
from era_vllm.errors import UnsupportedError
from era_vllm.lab.samples import load_samples
from era_vllm.lab.screen import muted, progress

ANSWER_TOKENS: Final = 9
"""The token after the prompt and 8 decode steps."""
_SPARE_TOKENS: Final = 256  # of the context, beside the picture
_CACHES: Final = 4  # contexts that the KV cache holds


def live_check(
    model: str, arguments: Mapping[str, object], config: EraConfig, layout: Layout
) -> Iterator[Finding]:
    """Ask a real engine and plain transformers about one picture.

    Args:    arguments: what ``vllm.LLM`` is given.   config: the same settings, parsed.
    """
    copies = 2 if current_platform.is_cpu() else 1  # the engine's is on the GPU
    try:
        with muted():
            lacking = lacking_memory(model, torch.float32, copies)
    except UnsupportedError as error:  # the parts of it that can be looked at are all right
        yield Finding(LIVE, "left out", str(error))
        return
    if lacking:
        advice = "leave the check out with --no-check, or run it where there is more memory"
        yield Finding(LIVE, "memory", lacking, advice)
        return
    sample = load_samples()[0]
    question = sample.questions[0].text
    rate = config.pruning_rate or min(DEFAULT_PRUNING_RATE, config.max_pruning_rate)
    progress("starting an engine and asking it about one picture (half a minute)")
    with muted():
        answer, built = live_answer(arguments, sample.image, question, rate, layout)
    progress("asking plain transformers the same")
    with muted():
        result = compare(open_language_oracle(model), answer, sample.image, config, rate)
    kept = sum(len(segment.anchors) for segment in answer.segments)
    n = sum(segment.n for segment in answer.segments)
    yield Finding(LIVE, "asked", f"{sample.files[0]}: {question}")
    kept_text = f"kept {kept} of {n} image tokens"
    yield Finding(LIVE, "engine", f"float32, eager; {built}; {kept_text}")
    yield from verdict(result, kept)


def live_answer(
    engine_args: Mapping[str, object], image: Image, question: str, rate: float, layout: Layout
) -> tuple[EngineAnswer, str]:
    """Start an engine, ask it about one picture, and stop it.

    Returns: the answer, and what the language model was built with in words.
    Raises:  UnsupportedError: the engine pruned nothing.
    """

    def describe(model: torch.nn.Module) -> str:
        layers = [part for part in model.modules() if isinstance(part, RectifiedAttention)]
        backend = layers[0].attn_backend.get_name()
        return f"{len(layers)} layers with heads of {layers[0].head_size} in {backend}"

    context = layout.image_tokens + _SPARE_TOKENS
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0, logprobs=-1, ignore_eos=True)
    with engine(
        engine_args,
        context=context,
        kv_bytes=max(_CACHES * context * layout.bytes_per_token, 32 << 20),
        max_num_batched_tokens=max(context, 1024),
        dtype="float32",
        max_num_seqs=2,
        max_logprobs=-1,
    ) as llm:
        (built,) = llm.apply_model(describe)
        renderer = llm.llm_engine.renderer
        mark = renderer.get_mm_processor().dummy_inputs.get_dummy_text({"image": 1})
        prompt = {
            "prompt": f"USER: {mark} {question} ASSISTANT:",
            "multi_modal_data": {"image": image},
            "mm_processor_kwargs": {"era": [rate]},
        }
        with Taken(llm) as taken:
            (output,) = llm.generate([prompt], sampling, use_tqdm=False)
    if not taken.items:
        raise UnsupportedError(
            "the engine answered without pruning the picture; needed one call of the pruning "
            "step; check the 'architecture' and 'plugin' lines above"
        )
    completion = output.outputs[0]
    rows = [[step[token].logprob for token in range(len(step))] for step in completion.logprobs]
    answer = EngineAnswer(
        token_ids=[*output.prompt_token_ids, *completion.token_ids[:-1]],
        log_probs=torch.tensor(rows),
        segments=taken.segments(),
        question=taken.items[0].item.plan.question,
    )
    return answer, built


def verdict(result: Check, kept: int) -> Iterator[Finding]:
    """Tell what a comparison found."""
    said = {
        True: f"the same {kept} as plain transformers chooses from features of its own",
        False: "not all those that plain transformers chooses: near-ties decided by a last bit",
        None: "as the engine chose them; no tower of plain transformers was asked",
    }
    yield Finding(LIVE, "anchors", said[result.same_anchors])
    yield Finding(
        LIVE,
        "with bias",
        f"{result.difference:.1e}: largest log-probability difference from plain transformers, "
        f"{result.positions} positions (prompt, {result.positions - 1} decode steps) x "
        f"{result.vocabulary} tokens; allowed {TOLERANCE:g}",
        ""
        if result.exact
        else "answers of this installation are wrong; do not serve with it. Is another plugin or "
        "an untested vLLM loaded? Report it with this page (era-vllm doctor --json)",
    )
    if result.without_bias is None:
        text = "not applicable: every bias is 0 with these settings"
        yield Finding(LIVE, "without bias", text)
        return
    needed = CONTROL_FACTOR * TOLERANCE
    yield Finding(
        LIVE,
        "without bias",
        f"{result.without_bias:.1e}: the control, same without the bias; needed {needed:g} or more",
        ""
        if result.control_fails
        else "the check cannot see the bias with these settings, so it proves nothing; run it with "
        "a higher --era-pruning-rate",
    )
