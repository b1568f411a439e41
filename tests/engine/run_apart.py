"""An engine in a process of its own: what cannot share the test process, saved for comparison.

Usage: run_apart.py CHECKPOINT ARGUMENTS OUT, where ARGUMENTS is JSON of ``LLM``'s own plus
``questions``: a list of [text, picture or null], asked in one batch.
"""

import json
import os
import sys

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets functions travel to our own workers
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import torch
from vllm import LLM, SamplingParams

import era_vllm
from era_vllm.lab.samples import load_samples


def listen(worker):
    """Keep what this rank prunes."""
    model = worker.get_model()
    model.seen = []
    model.on_prune = lambda tokens, result: model.seen.append((tokens, result))


def collect(worker):
    """Return this rank's attention, anchors, bias and pictures: lists, tensors do not travel."""
    rows = []
    for tokens, result in worker.get_model().seen:
        rows.append([x.tolist() for x in (tokens.attention, result.anchors, result.log_bias)])
        rows[-1].append(tokens.seeds.tolist())
    return rows


def accepted_drafts(llm):
    """Return how many drafted tokens were accepted so far."""
    found = [m.value for m in llm.get_metrics() if m.name.endswith("num_accepted_tokens")]
    return sum(found)


def main():
    """Answer and save."""
    checkpoint, raw, out = sys.argv[1:]
    arguments = json.loads(raw)
    questions = arguments.pop("questions")
    llm = LLM(
        **{
            **era_vllm.engine_args(checkpoint),
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
    params = SamplingParams(max_tokens=9, temperature=0, logprobs=-1, ignore_eos=True)
    answers = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        steps = output.outputs[0].logprobs
        table = [[step[i].logprob for i in range(len(step))] for step in steps]
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        answers.append({"ids": ids, "log_probs": torch.tensor(table)})
    ranks = llm.collective_rpc(collect)
    accepted = accepted_drafts(llm) if "speculative_config" in arguments else 0
    torch.save({"answers": answers, "ranks": ranks, "accepted": accepted}, out)


if __name__ == "__main__":
    main()
