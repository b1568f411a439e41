"""A process of its own: one pruned request under tensor parallelism, saved with every rank's view.

Usage: run_tensor_parallel.py CHECKPOINT OUT
"""

import os
import sys

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets functions travel to our own workers
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["TORCH_COMPILE_DISABLE"] = "1"

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
    """Return this rank's attention, anchors and bias, as lists: tensors do not travel back."""
    (pair,) = worker.get_model().seen
    return [x.tolist() for x in (pair[0].attention, pair[1].anchors, pair[1].log_bias)]


def main():
    """Answer and save."""
    checkpoint, out = sys.argv[1:]
    llm = LLM(
        **era_vllm.engine_args(checkpoint),
        tensor_parallel_size=2,
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        max_logprobs=128,
        kv_cache_memory_bytes=64 << 20,
    )
    llm.collective_rpc(listen)
    prompt = {
        "prompt": "USER: <image> what shape is red? ASSISTANT:",
        "multi_modal_data": {"image": load_samples()[0].image},
    }
    params = SamplingParams(max_tokens=9, temperature=0, logprobs=-1, ignore_eos=True)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    steps = output.outputs[0].logprobs
    table = [[step[i].logprob for i in range(len(step))] for step in steps]
    saved = {
        "ids": [*output.prompt_token_ids, *output.outputs[0].token_ids],
        "log_probs": torch.tensor(table),
        "ranks": [[torch.tensor(x) for x in rank] for rank in llm.collective_rpc(collect)],
    }
    torch.save(saved, out)


if __name__ == "__main__":
    main()
