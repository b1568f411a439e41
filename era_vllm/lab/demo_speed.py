"""Time to first token at several pruning rates: the same engine, rounds interleaved, new pictures.

Every picture is fresh noise, so no cache can answer for the encoder. A round times each rate
once; ratios are taken within a round, so that what slows the machine for a while slows both sides.
Leaves out the engine, which is a function here, and the model (``dummy.py``).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from era_vllm.lab.progress import bar

RATES: Final = (0.0, 0.778, 0.889, 0.944)
ROUNDS: Final = 3
"""Timed; one more before them warms every rate up."""

FirstToken = Callable[[Image.Image, float], int]
"""Answer about a picture at a rate with one token; returns the prompt's tokens."""


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
    noise = np.random.default_rng(0)
    seconds: list[list[float]] = [[] for _ in rates]
    tokens = [0] * len(rates)
    with bar((rounds + 1) * len(rates), "timing", "answer") as shown:
        for round_number in range(rounds + 1):
            for step in range(len(rates)):
                index = (step + round_number) % len(rates)  # no rate always follows the same one
                rate = rates[index]
                pixels = noise.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
                picture = Image.fromarray(pixels)
                started = time.perf_counter()
                tokens[index] = first_token(picture, rate)
                elapsed = time.perf_counter() - started
                if round_number > 0:
                    seconds[index].append(elapsed)
                shown.set_postfix_str(f"rate {rate:g}: {elapsed:.2f} s", refresh=False)
                shown.update()
    return [
        Timing(
            rate,
            tokens[index],
            tuple(seconds[index]),
            tuple(own / base for own, base in zip(seconds[index], seconds[0], strict=True)),
        )
        for index, rate in enumerate(rates)
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
