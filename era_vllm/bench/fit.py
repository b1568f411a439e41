"""Power laws by least squares on logarithms: how a time grows with a size."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
    """Fit a line to log y over log x.

    Raises:
        ValueError: fewer than two different x, or a value that has no logarithm.
    """
    if len(set(x)) < 2 or len(x) != len(y) or min(*x, *y) <= 0:
        raise ValueError(
            f"power law: got x {list(x)} and y {list(y)}; needed as many y as x, all positive, and "
            "two different x at least"
        )
    log_x, log_y = np.log(x), np.log(y)
    exponent, intercept = np.polyfit(log_x, log_y, 1)
    rest = log_y - (exponent * log_x + intercept)
    spread = float(((log_y - log_y.mean()) ** 2).sum())
    explained = 1.0 - float((rest**2).sum()) / spread if spread > 0 else 1.0
    return PowerLaw(float(np.exp(intercept)), float(exponent), explained)
