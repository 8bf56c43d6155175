"""Means over seeds with their intervals, differences of pairs, power laws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval; of one value there is none, and both ends are NaN."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def known(self) -> bool:
        return math.isfinite(self.low)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0: more than the noise between seeds."""
        return self.known and (self.low > 0 or self.high < 0)


def interval(values: Sequence[float]) -> Interval:
    """Mean and Student's t-interval (Student 1908, "The probable error of a mean").

    Raises:
      ValueError: no values.
    """
    if not values:
        raise ValueError("an interval of no values")
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Interval(mean, mean - half, mean + half, count)


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> Interval | None:
    """Of values less base, by seed, over the seeds that both have; None where there is none."""
    both = sorted(values.keys() & base.keys())
    if not both:
        return None
    return interval([values[seed] - base[seed] for seed in both])


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * x ** exponent, with the exponent's 95% interval."""

    factor: float
    exponent: Interval

    def __call__(self, x: float) -> float:
        return float(self.factor * x**self.exponent.mean)


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """By least squares between the logarithms (Kaplan et al. 2020, without an offset).

    Raises:
      ValueError: fewer than three different x, or what has no logarithm.
    """
    if len(set(x)) < 3:
        raise ValueError(f"a power law needs three different sizes at least, not {len(set(x))}")
    if min(*x, *y) <= 0:
        raise ValueError("a power law holds for numbers above 0 alone")
    fit = stats.linregress(np.log(x), np.log(y))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 2)) * float(fit.stderr)
    slope = float(fit.slope)
    return PowerLaw(
        float(np.exp(fit.intercept)), Interval(slope, slope - half, slope + half, len(x))
    )
