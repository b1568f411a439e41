"""The demo's second part: time to the first token of a larger dummy model at four pruning rates.

    python -m era_vllm.bench.first_token OUT.json

A process of its own, which ``cli/demo.py`` starts. One engine serves all rates: each prompt
carries its own; every picture is fresh noise, so no cache can answer for the encoder. The full
benchmark, against stock vLLM and a bound, is ``era-vllm bench serve``.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

from PIL.Image import Image

from era_vllm.bench.clock import interleave
from era_vllm.bench.inputs import image_prompt, noise_pictures
from era_vllm.bench.provenance import hardware
from era_vllm.bench.setup import named, set_environment
from era_vllm.lab.dummy import IMAGE_SIZE, LlamaSize, make_dummy_llava
from era_vllm.lab.screen import muted, progress

RATES: Final = (0.0, 0.778, 0.889, 0.944)
ROUNDS: Final = 3
"""Timed; one more before them warms every rate up."""
_DTYPE: Final = "bfloat16"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds to the first token at one rate, one number a round."""

    rate: float
    prompt_tokens: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    """Against rate 0 of the same round."""
    median_s: float
    ratio: float
    """Median of the ratios."""


def measure(
    first_token: Callable[[Image, float], tuple[float, int]],
    image_size: int,
    rates: Sequence[float] = RATES,
    rounds: int = ROUNDS,
) -> list[Timing]:
    """Time every rate in every round, with a progress bar.

    Args:
        first_token: Answers about a picture at a rate with one token; returns the seconds and the
            prompt's tokens.
        image_size: Side of the pictures, pixels.
        rates: The first is what the others are compared with.
        rounds: Timed rounds, >= 1; one more is run first and thrown away.
    """
    pictures = noise_pictures(image_size)
    tokens: dict[float, int] = {}

    def one(rate: float) -> dict[str, float]:
        elapsed, tokens[rate] = first_token(next(pictures), rate)
        return {"ttft": elapsed}

    def timing(rate: float) -> Timing:
        seconds, base = (samples.of(f"rate {r:g}", "ttft") for r in (rate, rates[0]))
        ratios = tuple(own / first for own, first in zip(seconds, base, strict=True))
        medians = statistics.median(seconds), statistics.median(ratios)
        return Timing(rate, tokens[rate], seconds, ratios, *medians)

    samples = interleave({f"rate {rate:g}": partial(one, rate) for rate in rates}, rounds)
    return [timing(rate) for rate in rates]


def table(timings: Sequence[Timing]) -> str:
    """Return medians and spread as a table."""
    lines = ["rate    prompt tokens   time to first token (least - most)   against rate 0"]
    for timing in timings:
        spread = f"({min(timing.seconds):.2f} - {max(timing.seconds):.2f})"
        lines.append(
            f"{timing.rate:<7g} {timing.prompt_tokens:>13}   {timing.median_s:>12.2f} s "
            f"{spread:<19}   {timing.ratio:>13.2f}x"
        )
    return "\n".join(lines)


def main() -> int:
    """Time every rate, print a table and write the figures."""
    set_environment(eager=True)
    size = LlamaSize()
    progress(f"starting an engine: {named(size)}")
    with muted():
        from era_vllm.bench.engines import TimedEngine
        from era_vllm.bench.sides import arguments_of, dummy_engine
    with tempfile.TemporaryDirectory() as folder:
        make_dummy_llava(Path(folder), size)
        arguments = arguments_of("pruned", Path(folder))
        with dummy_engine(arguments, _DTYPE, True, kv_bytes=512 << 20, context=1024) as llm:
            engine = TimedEngine(llm)

            def first_token(picture: Image, rate: float) -> tuple[float, int]:
                taken = engine.ask(image_prompt(picture, rate), decode_tokens=0)
                return taken["ttft"], engine.prompt_tokens

            timings = measure(first_token, IMAGE_SIZE)
    report = {
        "model": named(size),
        "dtype": _DTYPE,
        "image": f"{IMAGE_SIZE} x {IMAGE_SIZE} noise, a new one each time",
        "batch": 1,
        "measured": "time of LLM.generate with max_tokens=1, eager",
        "warm_up_rounds": 1,
        "rounds": ROUNDS,
        "timings": [asdict(timing) for timing in timings],
    }
    print(f"\n{report['model']}, {_DTYPE}, {hardware()}")
    print(f"{report['measured']}; medians of {ROUNDS} interleaved rounds\n")
    print(table(timings) + "\n")
    Path(sys.argv[1]).write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # demo.py says so
        sys.exit(130)
