"""Power laws of losses at several scales: loss = a * cost^-b + c, with intervals.

Kaplan et al. 2020, "Scaling laws for neural language models", equation 1.3, with the irreducible
part c of Hoffmann et al. 2022, "Training compute-optimal large language models", equation 2.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from unified_mm.runs.folder import RunFolder

EXPONENTS = np.geomspace(1e-3, 4, 500)  # that are tried for b
FLOORS = 500  # values of c that are tried


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval; a bound at the edge of what was tried is open."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class PowerLaw:
    """A fitted law: loss = scale * (cost / unit)^-exponent + floor.

    Attributes:
      unit: the geometric mean of the costs that were fitted.
      scale: a at cost = unit, so that it does not depend on b.
      exponent: b.
      floor: c.
      deviation: standard deviation of the losses around the law.
      lack_of_fit: the p-value of the F test for lack of fit (Draper & Smith 1998, "Applied
        regression analysis", section 2.1): how often losses this far from the law would come by
        chance if it held, judged by how losses at equal cost differ; None without repeats, or
        with only three costs.
    """

    unit: float
    scale: Interval
    exponent: Interval
    floor: Interval
    deviation: float
    lack_of_fit: float | None

    def __call__(self, cost: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Returns the loss that the law gives for each cost."""
        cost = np.asarray(cost, np.float64)
        return self.scale.value * (cost / self.unit) ** -self.exponent.value + self.floor.value


def fit_power_law(cost: Float[np.ndarray, " n"], loss: Float[np.ndarray, " _"]) -> PowerLaw:
    """Fits least squares over a > 0, b in [0.001, 4] and c in [0, the smallest loss].

    The intervals are those of the profile likelihood (Bates & Watts 1988, "Nonlinear regression
    analysis and its applications", section 6.1): all values for which, with the others at their
    best, the sum of squares is at most 1 + F(0.95; 1, n - 3) / (n - 3) times its minimum; for a,
    its best values with these b and c. With few points they are wide and often reach the edge,
    because b and c are then hard to tell apart.

    Args:
      cost: positive costs, such as FLOPs or parameters; at least three different ones.
      loss: the losses at these costs.

    Raises:
      ValueError: there are fewer than four points or three different costs, or a value is not
        positive and finite.
    """
    from scipy import stats

    cost, loss = np.asarray(cost, np.float64), np.asarray(loss, np.float64)
    _check(cost, loss)
    unit = float(np.exp(np.log(cost).mean()))
    floors = np.linspace(0, loss.min(), FLOORS)
    shape = (cost / unit) ** -EXPONENTS[:, None]  # [b, n]
    squares, scales = _squares(shape, loss, floors)
    b, c = np.unravel_index(np.argmin(squares), squares.shape)
    exponent, floor, least = _refined(cost / unit, loss, EXPONENTS[b], floors[c])
    scale = float(_best_scale((cost / unit) ** -exponent, loss - floor))
    free = len(loss) - 3
    limit = least * (1 + stats.f.ppf(0.95, 1, free) / free)
    near = squares <= max(limit, float(squares.min()))
    rows, columns = np.nonzero(near)

    def interval(value: float, values: Float[np.ndarray, " m"]) -> Interval:
        return Interval(value, min(value, float(values.min())), max(value, float(values.max())))

    return PowerLaw(
        unit,
        interval(scale, scales[near]),
        interval(exponent, EXPONENTS[rows]),
        interval(floor, floors[columns]),
        float(np.sqrt(least / free)),
        _lack_of_fit(cost, loss, least),
    )


def cost_and_loss(
    runs: Sequence[str | os.PathLike[str]], score: str = "caption/nats"
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Returns the training FLOPs and a score of each finished run.

    Raises:
      ValueError: a run is not finished or has no such score.
    """
    cost, loss = [], []
    for run in runs:
        folder = RunFolder(run)
        result = folder.read_result() if folder.finished else {}
        if result.get("flops") is None or score not in result.get("scores", {}):
            raise ValueError(f"{folder.path} has no result with its FLOPs and {score}")
        cost.append(result["flops"])
        loss.append(result["scores"][score])
    return np.array(cost, np.float64), np.array(loss, np.float64)


def _check(cost: np.ndarray, loss: np.ndarray) -> None:
    if cost.shape != loss.shape or cost.ndim != 1:
        raise ValueError(f"{cost.shape} costs and {loss.shape} losses: give one loss for each cost")
    if len(cost) < 4 or len(np.unique(cost)) < 3:
        raise ValueError(
            f"{len(cost)} points at {len(np.unique(cost))} different costs: a law of three numbers "
            "needs four points at three costs at least"
        )
    if (
        not (np.isfinite(cost).all() and np.isfinite(loss).all())
        or min(cost.min(), loss.min()) <= 0
    ):
        raise ValueError("costs and losses must be positive and finite")


def _lack_of_fit(
    cost: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"], least: float
) -> float | None:
    from scipy import stats

    costs, which = np.unique(cost, return_inverse=True)
    means = np.bincount(which, loss) / np.bincount(which)
    within = float(np.square(loss - means[which]).sum())
    repeats, spare = len(loss) - len(costs), len(costs) - 3
    if repeats < 1 or spare < 1 or within == 0:
        return None
    return float(stats.f.sf((least - within) / spare / (within / repeats), spare, repeats))


def _squares(
    shape: Float[np.ndarray, "b n"], loss: Float[np.ndarray, " n"], floors: Float[np.ndarray, " c"]
) -> tuple[Float[np.ndarray, "b c"], Float[np.ndarray, "b c"]]:
    """Returns sums of squares with the best scale for each exponent and floor, and these scales."""
    above = loss - floors[:, None]  # [c, n]
    products = shape @ above.T
    lengths = np.square(shape).sum(1, keepdims=True)
    scales = np.maximum(products / lengths, 0)
    squares = np.square(above).sum(1) - 2 * scales * products + np.square(scales) * lengths
    return np.maximum(squares, 0), scales


def _best_scale(shape: Float[np.ndarray, " n"], above: Float[np.ndarray, " n"]) -> float:
    return max(0.0, float(shape @ above / (shape @ shape)))


def _refined(
    ratio: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"], exponent: float, floor: float
) -> tuple[float, float, float]:
    """Returns the best exponent and floor near those of the grid, and their sum of squares."""
    from scipy import optimize

    def away(x: Float[np.ndarray, " 2"]) -> Float[np.ndarray, " n"]:
        shape = ratio ** -np.exp(x[0])
        return _best_scale(shape, loss - x[1]) * shape + x[1] - loss

    lowest = (np.log(EXPONENTS[0]), 0.0)
    highest = (np.log(EXPONENTS[-1]), float(loss.min()))
    start = np.clip([np.log(exponent), floor], lowest, highest)
    found = optimize.least_squares(
        away, start, bounds=(lowest, highest), xtol=1e-12, ftol=1e-12, gtol=1e-12
    )
    return float(np.exp(found.x[0])), float(found.x[1]), float(2 * found.cost)
