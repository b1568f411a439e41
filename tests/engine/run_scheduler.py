"""An engine whose scheduler lives in a process of its own: what it knows of pictures' rows.

Usage: run_scheduler.py CHECKPOINT ARGUMENTS OUT, where ARGUMENTS is JSON of ``LLM``'s own. Four
pictures are asked about twice, with empty caches of encoder and language model each time, so that
they are encoded twice but processed once.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

from vllm import LLM, SamplingParams

import era_vllm
from era_vllm.bench.inputs import noise_pictures
from era_vllm.vllm_plugin.fields import work_of
from era_vllm.vllm_plugin.scheduler import EraScheduler

LINES = "ERA_TEST_LINES"


class Telling(EraScheduler):
    """Says what it is asked; travels to the engine's process by its name."""

    def encoder_work(self, feature):
        """Return the work, and write down what is known."""
        work = super().encoder_work(feature)
        with open(os.environ[LINES], "a") as file:
            file.write(
                json.dumps([os.getpid(), work_of(feature.data, feature.modality), work]) + "\n"
            )
        return work


def main():
    """Ask and save."""
    checkpoint, raw, out = sys.argv[1:]
    lines = Path(out).with_suffix(".lines")
    os.environ[LINES] = str(lines)
    llm = LLM(
        **era_vllm.engine_args(checkpoint),
        **json.loads(raw),
        scheduler_cls="run_scheduler.Telling",
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=False,
    )
    pictures = noise_pictures(168)
    prompts = [
        {"prompt": "USER: <image> what? ASSISTANT:", "multi_modal_data": {"image": next(pictures)}}
        for _ in range(4)
    ]
    for _ in range(2):
        llm.generate(prompts, SamplingParams(max_tokens=2), use_tqdm=False)
        llm.reset_prefix_cache()
        llm.llm_engine.reset_encoder_cache()
    hits = sum(one.value for one in llm.get_metrics() if one.name == "vllm:mm_cache_hits")
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    processes, rows, work = zip(*told, strict=True)
    assert os.getpid() not in processes
    Path(out).write_text(json.dumps({"rows": rows, "work": work, "hits": hits}))


if __name__ == "__main__":
    main()
