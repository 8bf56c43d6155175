"""Means with their 95% confidence intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Mean:
    """A mean with its confidence interval, which is NaN for a single value."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def known(self) -> bool:
        """Returns whether there is an interval."""
        return math.isfinite(self.low)

    @property
    def excludes_zero(self) -> bool:
        """Returns whether the interval lies on one side of 0."""
        return self.known and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def mean_interval(values: Float[np.ndarray, " values"], level: float = 0.95) -> Mean:
    """Returns the mean of independent values with its t-interval.

    Student 1908, "The probable error of a mean".

    Raises:
      ValueError: there is no value.
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


def paired_difference(values: Mapping[Any, float], base: Mapping[Any, float]) -> Mean | None:
    """Returns the mean of `values` less `base`, pair by pair.

    Args:
      values, base: values by the key that pairs them, such as a seed.

    Returns:
      The mean with its interval, or None where there is no pair.
    """
    both = sorted(values.keys() & base.keys(), key=str)
    if not both:
        return None
    return mean_interval(np.array([values[key] - base[key] for key in both]))
