"""An engine of a random family in a process of its own, for what the test process cannot hold.

Usage: run_family.py FAMILY CHECKPOINT ARGUMENTS OUT: asks what ``families.case.asks_apart`` says
and saves the answers, and what each rank pruned. ARGUMENTS is JSON of ``LLM``'s own, plus
``settings``, ours.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets functions travel to our own workers
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from vllm import LLM, SamplingParams

import era_vllm
from tests.engine.families import CASES
from tests.engine.families.case import asks_apart
from tests.engine.families.qwen import EXPERTS


def listen(worker):
    """Keep what this rank prunes."""
    model = worker.get_model()
    model.seen = []
    model.reducer.listeners.append(model.seen.extend)


def collect(worker):
    """Return hash, K, and each segment's grid, anchors and assignment of what this rank pruned."""
    return [
        (
            one.item.pixel_hash,
            one.item.plan.num_anchors,
            [
                (
                    s.tokens.grid,
                    s.result.anchors[s.row].tolist(),
                    s.result.assignment[s.row].tolist(),
                )
                for s in one.segments
            ],
        )
        for one in worker.get_model().seen
    ]


def counter(llm, name):
    """Return a counter of vLLM's, summed over its labels."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def main():
    """Answer and save."""
    family, checkpoint, raw, out = sys.argv[1:]
    case = next(one for one in (*CASES, EXPERTS) if one.name == family)
    arguments = json.loads(raw)
    pruning = era_vllm.engine_args(checkpoint, **arguments.pop("settings"))
    llm = LLM(**pruning, **arguments, disable_log_stats=False)
    llm.collective_rpc(listen)
    params = SamplingParams(max_tokens=9, temperature=0, logprobs=-1, ignore_eos=True)
    prompts = [ask.prompt() for ask in asks_apart(case)]
    answers = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        rows = output.outputs[0].logprobs
        table = torch.tensor([[row[i].logprob for i in range(len(row))] for row in rows])
        answers.append((list(output.prompt_token_ids), list(output.outputs[0].token_ids), table))
    saved = {
        "answers": answers,
        "ranks": llm.collective_rpc(collect),
        "drafted": counter(llm, "spec_decode_num_draft_tokens"),
        "accepted": counter(llm, "spec_decode_num_accepted_tokens"),
        "loaded": counter(llm, "external_prefix_cache_hits"),
    }
    torch.save(saved, out)


if __name__ == "__main__":
    main()
