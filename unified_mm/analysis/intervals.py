"""Means and their 95% intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Mean:
    """A mean and the interval around it; the interval is not a number for one value alone."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def mean_interval(values: Float[np.ndarray, " I"], level: float = 0.95) -> Mean:
    """The mean of independent values with Student's t-interval.

    Raises:
      ValueError: no value.
    """
    from scipy import stats

    values = np.asarray(values, np.float64)
    count = len(values)
    if not count:
        raise ValueError("there is no value to take the mean of")
    mean = float(values.mean())
    if count == 1:
        return Mean(mean, float("nan"), float("nan"), 1)
    spread = float(stats.t.ppf((1 + level) / 2, count - 1) * values.std(ddof=1) / count**0.5)
    return Mean(mean, mean - spread, mean + spread, count)
