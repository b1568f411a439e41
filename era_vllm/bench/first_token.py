"""The demo's last part: time to the first token of a larger dummy model at four pruning rates.

    python -m era_vllm.bench.first_token OUT.json [0.9b|qwen3-vl-2b]

A process of its own, which ``cli/demo.py`` starts. One engine serves all rates: each prompt
carries its own; every picture is fresh noise, so no cache can answer for the encoder. The full
benchmark, against stock vLLM and a bound, is ``era-vllm bench serve``.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from era_vllm.bench.clock import Samples, interleave
from era_vllm.bench.inputs import image_prompt, noise_pictures
from era_vllm.bench.options import EngineOptions
from era_vllm.bench.provenance import fast_dtype, hardware
from era_vllm.bench.setup import named, set_environment
from era_vllm.lab.screen import muted, progress

RATES: Final = (0.0, 0.778, 0.889, 0.944)
ROUNDS: Final = 3
"""Timed; one more before them warms every rate up."""
SHAPES: Final = {"0.9b": ("llava", None), "qwen3-vl-2b": ("qwen3-vl", 512)}
"""Shape -> family, and pixels of a picture's side (None = the family's)."""


def timings_of(samples: Samples, tokens: Mapping[float, int]) -> list[dict[str, float]]:
    """Return for each rate its seconds, one a round, and ratios to the first rate's of that round.

    Args:
        samples: A cell a rate, named after it; ``ttft`` is its measure.
        tokens: Rate -> the prompt's.
    """
    first = f"{next(iter(tokens)):g}"
    return [
        {
            "rate": rate,
            "prompt_tokens": prompt_tokens,
            "seconds": samples.of(f"{rate:g}", "ttft"),
            "ratios": samples.ratios(f"{rate:g}", first, "ttft"),
            "median_s": samples.median(f"{rate:g}", "ttft"),
            "ratio": samples.ratio(f"{rate:g}", first, "ttft"),
        }
        for rate, prompt_tokens in tokens.items()
    ]


def table(timings: Sequence[Mapping]) -> str:
    """Return medians and spread as a table."""
    lines = ["rate    prompt tokens   time to first token (least - most)   against rate 0"]
    for timing in timings:
        spread = f"({min(timing['seconds']):.2f} - {max(timing['seconds']):.2f})"
        lines.append(
            f"{timing['rate']:<7g} {timing['prompt_tokens']:>13}   {timing['median_s']:>12.2f} s "
            f"{spread:<19}   {timing['ratio']:>13.2f}x"
        )
    return "\n".join(lines)


def main(out: Path, shape: str = "0.9b") -> int:
    """Time every rate, print a table and write the figures."""
    set_environment(eager=True)
    family, side = SHAPES[shape]
    options = EngineOptions(
        rounds=ROUNDS,
        warm_ups=1,
        shape=shape,
        dtype=fast_dtype(),
        family=family,
        side=side,
        rates=list(RATES),
        text_tokens=0,
        decode_tokens=0,
        kv_bytes=512 << 20,
        eager=True,
        context=1024,
        era={},
    )
    asked, tokens = options.asked, dict.fromkeys(RATES, 0)
    height, width = asked.picture
    pictures = noise_pictures(height, width)
    progress("importing vLLM")
    with muted():
        from era_vllm.bench.sides import side_by_side
    with side_by_side({"era": ("pruned", False)}, options) as engines:

        def ask(rate: float) -> Mapping[str, float]:
            prompt = image_prompt(next(pictures), rate, mark=asked.mark)
            taken = engines["era"].ask(prompt, options.decode_tokens)
            tokens[rate] = engines["era"].prompt_tokens
            return taken

        samples = interleave({f"{rate:g}": partial(ask, rate) for rate in RATES}, options.rounds)
    timings = timings_of(samples, tokens)
    report = {
        "model": named(options.size, family),
        "dtype": options.dtype,
        "image": f"{width} x {height} noise, a new one each time",
        "batch": 1,
        "measured": "time of LLM.generate with max_tokens=1, eager",
        "warm_up_rounds": 1,
        "rounds": ROUNDS,
        "timings": timings,
    }
    print(f"\n{report['model']}, {options.dtype}, {hardware()}")
    print(f"{report['measured']}; medians of {ROUNDS} interleaved rounds\n")
    print(table(timings) + "\n")
    out.write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
    except KeyboardInterrupt:  # demo.py says so
        sys.exit(130)
