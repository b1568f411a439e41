"""A process of its own that times the first token with a large dummy model; ``demo.py`` starts it.

    python -m era_vllm.cli.speed_engine OUT.json

One engine serves all rates: each prompt carries its own. Leaves out what is timed and how
(``lab/demo_speed.py``).
"""

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Final

from PIL.Image import Image

from era_vllm.cli.findings import core_count
from era_vllm.cli.quiet import QUIET, muted, progress
from era_vllm.lab.demo_speed import FirstToken, measure
from era_vllm.lab.dummy import IMAGE_SIZE, LlamaSize, make_dummy_llava

_CONTEXT: Final = 1024
_QUESTION: Final = "USER: <image>\nwhat color is the circle? ASSISTANT:"


def main() -> int:
    """Time every rate and write the figures."""
    out = Path(sys.argv[1])
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}
    for name, value in {**QUIET, **own, "OMP_NUM_THREADS": str(core_count())}.items():
        os.environ.setdefault(name, value)
    size = LlamaSize()
    billions = size.parameters / 1e9
    progress(f"starting an engine: {billions:.1f} B Llama behind CLIP-L/14-336, dummy weights")
    with tempfile.TemporaryDirectory() as folder, muted():
        make_dummy_llava(Path(folder), size)
        first_token = _engine(folder)
    timings = measure(first_token, IMAGE_SIZE)
    report = {
        "model": f"{billions:.2f} B Llama ({size.layers} layers x {size.hidden}) behind "
        "CLIP-L/14-336, dummy weights",
        "dtype": "bfloat16",
        "image": f"{IMAGE_SIZE} x {IMAGE_SIZE} noise, a new one each time",
        "batch": 1,
        "measured": "time of LLM.generate with max_tokens=1, eager",
        "warm_up_rounds": 1,
        "rounds": len(timings[0].seconds),
        "timings": [
            {**asdict(timing), "median_s": timing.median_s, "ratio": timing.ratio}
            for timing in timings
        ],
    }
    out.write_text(json.dumps(report), encoding="utf-8")
    return 0


def _engine(folder: str) -> FirstToken:
    from vllm import LLM, SamplingParams

    from era_vllm import engine_args

    llm = LLM(
        **engine_args(folder),
        load_format="dummy",
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=_CONTEXT,
        max_num_batched_tokens=_CONTEXT,
        max_num_seqs=2,
        limit_mm_per_prompt={"image": 1},
        kv_cache_memory_bytes=512 << 20,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0)

    def first_token(picture: Image, rate: float) -> int:
        prompt = {
            "prompt": _QUESTION,
            "multi_modal_data": {"image": picture},
            "mm_processor_kwargs": {"era": [rate]},
        }
        (output,) = llm.generate([prompt], sampling, use_tqdm=False)
        return len(output.prompt_token_ids)

    return first_token


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # demo.py says so
        sys.exit(130)
