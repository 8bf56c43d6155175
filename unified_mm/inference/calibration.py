"""Calibration: a threshold whose risk is stated, whatever the score and the model are.

Angelopoulos et al. 2021, "Learn then test": thresholds are tested from safe to bold, each against
the hypothesis that its risk is above the tolerance, and the first that cannot be refuted ends it.
The boldest one that passed keeps the tolerance with probability 1 - error over calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Calibrated:
    """A threshold with its stated risk.

    Attributes:
      threshold: of the score.
      tolerance: the most that the risk, the mean loss of an example, is ...
      error: ... except with this probability.
      risk: the mean loss of the examples that it was found on.
      examples: how many there were.
    """

    threshold: float
    tolerance: float
    error: float
    risk: float
    examples: int


def calibrate(
    losses_at: Callable[[float], Float[np.ndarray, " examples"]],
    thresholds: Sequence[float],
    tolerance: float,
    error: float,
) -> Calibrated | None:
    """Returns the boldest threshold whose risk is stated, None where there is none.

    Args:
      losses_at: the loss, in [0, 1], of each example where a threshold is used. The examples are
        drawn independently, and the same each time.
      thresholds: from safe to bold; chosen before the examples are seen.
      tolerance: the risk that is allowed.
      error: the probability with which it may be exceeded.

    Raises:
      ValueError: there are no examples, a loss is not in [0, 1], or the error not in (0, 1).
    """
    if not 0 < error < 1:
        raise ValueError(
            f"error={error}: must be above 0 and below 1, for with 1 any threshold would do"
        )
    found = None
    for threshold in thresholds:
        losses = np.asarray(losses_at(threshold), np.float64)
        if not losses.size or not ((losses >= 0) & (losses <= 1)).all():
            raise ValueError("a risk is calibrated on losses in [0, 1] of one example at least")
        risk = float(losses.mean())
        if p_value(risk, losses.size, tolerance) > error:
            break
        found = Calibrated(float(threshold), tolerance, error, risk, losses.size)
    return found


def p_value(risk: float, examples: int, tolerance: float) -> float:
    """Returns how likely a mean loss at most `risk` is where the true one is above the tolerance.

    It is the smaller one of two bounds, of Hoeffding and of Bentkus (Bates et al. 2021, theorem 5).
    """
    if risk >= tolerance:
        return 1.0
    hoeffding = math.exp(-examples * divergence(risk, tolerance))
    # What is a whole number of losses may lie above it by rounding.
    bentkus = math.e * binomial_cdf(math.ceil(examples * risk - 1e-9), examples, tolerance)
    return min(hoeffding, bentkus, 1.0)


def divergence(a: float, b: float) -> float:
    """Returns the divergence of Bernoulli variables of means a <= b, in nats."""
    return sum(p * math.log(p / q) if p > 0 else 0.0 for p, q in ((a, b), (1 - a, 1 - b)))


def binomial_cdf(most: int, trials: int, chance: float) -> float:
    """Returns the probability of at most so many successes."""
    k = np.arange(most + 1)
    choices = [
        math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1) for i in k
    ]
    return float(np.exp(choices + k * math.log(chance) + (trials - k) * math.log1p(-chance)).sum())
