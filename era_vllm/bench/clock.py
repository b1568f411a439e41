"""Interleaved rounds: each cell is run once a round, so what slows the machine slows all sides.

A cell is a function that does one pass and says what it measured, in seconds by name. Ratios are
taken within a round and their median is reported; a power law says how times grow. Leaves out what
a cell does.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.benchmark import timer

from era_vllm.lab.screen import bar

Cell = Callable[[], Mapping[str, float]]
"""One pass; returns seconds by measure."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What the cells measured: cell -> measure -> one number a round."""

    values: Mapping[str, Mapping[str, Sequence[float]]]

    def of(self, cell: str, measure: str) -> Sequence[float]:
        """One number a round; empty if the cell does not measure it."""
        return self.values[cell].get(measure, ())

    def median(self, cell: str, measure: str) -> float | None:
        """Median over the rounds; None if the cell does not measure it."""
        values = self.of(cell, measure)
        return statistics.median(values) if values else None

    def p90(self, cell: str, measure: str) -> float | None:
        """90th percentile over the rounds; None if the cell does not measure it."""
        values = self.of(cell, measure)
        return p90(values) if values else None

    def ratio(
        self, cell: str, base: str, measure: str, base_measure: str | None = None
    ) -> float | None:
        """Median of cell / base, each pair of the same round; None if one does not measure it."""
        found = self.ratios(cell, base, measure, base_measure)
        return statistics.median(found) if found else None

    def ratios(
        self, cell: str, base: str, measure: str, base_measure: str | None = None
    ) -> list[float]:
        """Return cell / base, one number a round; empty if one does not measure it."""
        other = self.of(base, base_measure or measure)
        return [mine / base for mine, base in zip(self.of(cell, measure), other, strict=False)]

    def summary(self) -> dict[str, dict[str, dict[str, object]]]:
        """Return median, 90th percentile and values of everything, for JSON."""
        return {
            cell: {
                measure: {
                    "median_s": statistics.median(values),
                    "p90_s": p90(values),
                    "values_s": list(values),
                }
                for measure, values in measures.items()
            }
            for cell, measures in self.values.items()
        }


def p90(values: Sequence[float]) -> float:
    """Return the 90th percentile, interpolated between neighbours."""
    return float(np.quantile(values, 0.9))


def interleave(cells: Mapping[str, Cell], rounds: int, warm_ups: int = 1) -> Samples:
    """Run every cell once a round, with a progress bar.

    Args:
        cells: Name -> pass. The order is rotated, so that none always follows the same one.
        rounds: Timed rounds, >= 1.
        warm_ups: Rounds that are run first and thrown away.
    """
    names = list(cells)
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    with bar((warm_ups + rounds) * len(names), "timing", "pass") as shown:
        for number in range(warm_ups + rounds):
            for step in range(len(names)):
                name = names[(step + number) % len(names)]
                shown.set_postfix_str(name, refresh=False)
                for measure, value in cells[name]().items():
                    if number >= warm_ups:
                        taken[name].setdefault(measure, []).append(value)
                shown.update()
    return Samples(taken)


def seconds(call: Callable[[], object]) -> float:
    """Time one call in inference mode, a GPU's work included."""
    with torch.inference_mode():
        started = timer()  # waits for a GPU
        call()
        return timer() - started


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """y = factor x ** exponent."""

    factor: float
    exponent: float
    r_squared: float
    """Share of the variance of log y that the law explains; 1 where y does not vary."""

    def __call__(self, x: float) -> float:
        """Return y."""
        return self.factor * x**self.exponent

    def __str__(self) -> str:
        return f"{self.exponent:.2f} (R2 {self.r_squared:.3f})"


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fit a line to log y over log x by least squares.

    Raises:
        ValueError: fewer than two different x, or a value that has no logarithm.
    """
    if len(set(x)) < 2 or len(x) != len(y) or min(*x, *y) <= 0:
        raise ValueError(
            f"power law: got x {list(x)} and y {list(y)}; needed as many y as x, all positive, and "
            "two different x at least"
        )
    logs = [[math.log(value) for value in values] for values in (x, y)]
    exponent, intercept = statistics.linear_regression(*logs)
    r_squared = statistics.correlation(*logs) ** 2 if len(set(logs[1])) > 1 else 1.0
    return PowerLaw(math.exp(intercept), exponent, r_squared)
