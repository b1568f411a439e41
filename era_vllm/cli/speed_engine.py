"""A process of its own that times the first token with a large dummy model; ``demo.py`` starts it.

    python -m era_vllm.cli.speed_engine OUT.json

One engine serves all rates: each prompt carries its own. Leaves out what is timed and how
(``lab/demo_speed.py``) and the engine (``bench_engines.py``).
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Final

from PIL.Image import Image

from era_vllm.cli.bench_setup import EngineOptions, named, set_environment
from era_vllm.cli.quiet import muted, progress
from era_vllm.lab.bench.inputs import image_prompt
from era_vllm.lab.demo_speed import measure
from era_vllm.lab.dummy import IMAGE_SIZE, LlamaSize, make_dummy_llava

_OPTIONS: Final = EngineOptions("bfloat16", eager=True, kv_bytes=512 << 20, context=1024)


def main() -> int:
    """Time every rate and write the figures."""
    out = Path(sys.argv[1])
    set_environment(eager=True)
    size = LlamaSize()
    progress(f"starting an engine: {named(size)}")
    with tempfile.TemporaryDirectory() as folder, muted():
        from era_vllm.cli.bench_engines import pruned

        make_dummy_llava(Path(folder), size)
        engine = pruned(Path(folder), _OPTIONS)

    def first_token(picture: Image, rate: float) -> tuple[float, int]:
        taken = engine.ask(image_prompt(picture, rate), decode_tokens=0)
        return taken["ttft"], engine.prompt_tokens

    timings = measure(first_token, IMAGE_SIZE)
    report = {
        "model": named(size),
        "dtype": _OPTIONS.dtype,
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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # demo.py says so
        sys.exit(130)
