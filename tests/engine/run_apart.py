"""An engine in a process of its own: what cannot share the test process, saved for comparison.

Usage: run_apart.py CHECKPOINT ARGUMENTS OUT, where ARGUMENTS is JSON of ``LLM``'s own plus

    questions  [text, picture or null] each, asked in one batch
    settings   ours, or null for stock vLLM
    steps      tokens to answer, 9 by default
    rounds     how often to ask, once by default; the last answers are saved
"""

import json
import os
import sys

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets functions travel to our own workers
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.attention import Attention

import era_vllm
from era_vllm.lab.samples import load_samples
from era_vllm.types import Signal


def listen(worker):
    """Keep what this rank prunes."""
    model = worker.get_model()
    model.seen = []  # stays empty in stock vLLM
    if hasattr(model, "reducer"):
        model.reducer.listeners.append(model.seen.extend)


def collect(worker):
    """Return this rank's attention, anchors, bias, pictures, embeddings: tensors do not travel.

    Queries of the language model, relevance, or a scout's states, where these are read instead.
    """
    rows = []
    calls = {id(s.result): s for item in worker.get_model().seen for s in item.segments}
    for tokens, result, *_ in calls.values():
        signals = (
            Signal.ENCODER_ATTENTION,
            Signal.LANGUAGE_QUERIES,
            Signal.RELEVANCE,
            Signal.SCOUT_STATES,
        )
        kept = (
            next(tokens.signals[signal] for signal in signals if signal in tokens.signals),
            result.anchors,
            result.log_bias,
            tokens.pixel_hash,
            result.embeds,
        )
        rows.append([values.tolist() for values in kept])
    return rows


def describe(worker):
    """Return what this rank runs."""
    layer = next(m for m in worker.get_model().modules() if isinstance(m, Attention))
    backend = layer.attn_backend.get_name()
    return {
        "backend": backend,
        "kernel": getattr(layer, "isa", backend),  # a CPU has several in one backend
        "head_size": layer.head_size,
        "runner": type(worker.model_runner).__module__,
    }


def counter(llm, name):
    """Return a counter of vLLM's, summed over its labels."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def main():
    """Answer and save."""
    checkpoint, raw, out = sys.argv[1:]
    arguments = json.loads(raw)
    questions, settings = arguments.pop("questions"), arguments.pop("settings")
    steps, rounds = arguments.pop("steps", 9), arguments.pop("rounds", 1)
    llm = LLM(
        **{
            "model": checkpoint,
            **({} if settings is None else era_vllm.engine_args(checkpoint, **settings)),
            "dtype": "float32",
            "max_model_len": 512,
            "enforce_eager": True,
            "max_logprobs": 128,
            "kv_cache_memory_bytes": 64 << 20,
            "disable_log_stats": False,
            **arguments,
        },
    )
    llm.collective_rpc(listen)
    samples = load_samples()
    prompts = []
    for text, picture in questions:
        image = "" if picture is None else "<image> "
        prompts.append({"prompt": f"USER: {image}{text} ASSISTANT:"})
        if picture is not None:
            prompts[-1]["multi_modal_data"] = {"image": samples[picture].image}
    params = SamplingParams(max_tokens=steps, temperature=0, logprobs=-1, ignore_eos=True)
    for _ in range(rounds):
        outputs = llm.generate(prompts, params, use_tqdm=False)
    answers = []
    for output in outputs:
        rows = output.outputs[0].logprobs
        table = [[row[i].logprob for i in range(len(row))] for row in rows]
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        cached = output.num_cached_tokens or 0
        answers.append({"ids": ids, "log_probs": torch.tensor(table), "cached": cached})
    config = llm.llm_engine.vllm_config
    saved = {
        "answers": answers,
        "ranks": llm.collective_rpc(collect),
        "accepted": counter(llm, "spec_decode_num_accepted_tokens"),
        "loaded": counter(llm, "external_prefix_cache_hits"),
        "preempted": counter(llm, "num_preemptions"),
        **llm.collective_rpc(describe)[0],
        "async": config.scheduler_config.async_scheduling,
        "graphs": config.compilation_config.cudagraph_mode.name,
        "graph_sizes": config.compilation_config.cudagraph_capture_sizes,
    }
    torch.save(saved, out)


if __name__ == "__main__":
    main()
