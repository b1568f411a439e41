"""Time to first token at several pruning rates: the same engine, interleaved rounds, new pictures.

Every picture is fresh noise, so no cache can answer for the encoder. Leaves out the rounds
(``bench/clock.py``), the engine, which is a function here, and the model (``dummy.py``). The full
benchmark, against stock vLLM and a bound, is ``era-vllm bench serve``.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from PIL import Image

from era_vllm.lab.bench.clock import interleave
from era_vllm.lab.bench.inputs import noise_pictures

RATES: Final = (0.0, 0.778, 0.889, 0.944)
ROUNDS: Final = 3
"""Timed; one more before them warms every rate up."""

FirstToken = Callable[[Image.Image, float], tuple[float, int]]
"""Answer about a picture at a rate with one token; returns the seconds and the prompt's tokens."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds to the first token at one rate, one number a round."""

    rate: float
    prompt_tokens: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    """Against rate 0 of the same round."""

    @property
    def median_s(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """Median of the paired ratios."""
        return statistics.median(self.ratios)


def measure(
    first_token: FirstToken,
    image_size: int,
    rates: Sequence[float] = RATES,
    rounds: int = ROUNDS,
) -> list[Timing]:
    """Time every rate in every round, with a progress bar.

    Args:
        first_token: What is timed.
        image_size: Side of the pictures, pixels.
        rates: The first is what the others are compared with.
        rounds: Timed rounds, >= 1; one more is run first and thrown away.
    """
    pictures = noise_pictures(image_size)
    tokens: dict[float, int] = {}

    def one(rate: float) -> dict[str, float]:
        elapsed, tokens[rate] = first_token(next(pictures), rate)
        return {"ttft": elapsed}

    samples = interleave({f"rate {rate:g}": partial(one, rate) for rate in rates}, rounds)
    seconds = [samples.of(f"rate {rate:g}", "ttft") for rate in rates]
    return [
        Timing(
            rate,
            tokens[rate],
            own,
            tuple(mine / base for mine, base in zip(own, seconds[0], strict=True)),
        )
        for rate, own in zip(rates, seconds, strict=True)
    ]


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
