"""Linear probes: how well a linear map of one layer's features tells a label.

Alain & Bengio 2017, "Understanding intermediate layers using linear classifier probes". A probe
says what can be read off a layer, not what the model does with it (Belinkov 2022, "Probing
classifiers", section 4).

A probe is ridge regression on indicators of the classes (Hastie et al. 2009, "The elements of
statistical learning", section 4.2), which has a closed form: one singular value decomposition of a
layer's features serves all its labels and penalties, and gives the errors of leaving each example
out exactly (the same book, section 7.10.1), by which the penalty is chosen.

Letters: ``I`` examples, ``D`` features, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

# Of the mean eigenvalue of the features' covariance, which is 1 where none is constant.
PENALTIES = tuple(10.0**power for power in range(-5, 3))


@dataclass(frozen=True)
class Target:
    """What a probe has to tell: of each example [I] a class by number."""

    name: str
    classes: tuple[str, ...]
    labels: Int[np.ndarray, " I"]


@dataclass(frozen=True)
class Labelled:
    """Features of the same examples by layer, each [I, D], and what is known of the examples."""

    features: Mapping[str, Float[np.ndarray, "_ _"]]
    targets: Sequence[Target]

    def __len__(self) -> int:
        return len(self.targets[0].labels)


@dataclass(frozen=True)
class Standardised:
    """Features less their mean, over their deviation, and how that is done to others."""

    values: Float[np.ndarray, "I D"]
    mean: Float[np.ndarray, " D"]
    deviation: Float[np.ndarray, " D"]

    @classmethod
    def of(cls, x: Float[np.ndarray, "I D"]) -> Standardised:
        """A feature that is the same everywhere becomes 0."""
        x = x.astype(np.float64)
        mean, deviation = x.mean(0), x.std(0)
        deviation = np.where(deviation > 1e-9 * (1 + np.abs(mean)), deviation, np.inf)
        return cls((x - mean) / deviation, mean, deviation)

    def other(self, x: Float[np.ndarray, "J D"]) -> Float[np.ndarray, "J D"]:
        return (x - self.mean) / self.deviation


@dataclass(frozen=True)
class Probe:
    """A linear map to scores of classes: x @ weights + bias.

    Attributes:
      penalty: that was chosen, times the number of examples what ridge regression adds.
    """

    weights: Float[np.ndarray, "D C"]
    bias: Float[np.ndarray, " C"]
    penalty: float


def ridge_probes(
    x: Float[np.ndarray, "I D"], indicators: Sequence[Float[np.ndarray, "I _"]]
) -> list[Probe]:
    """A probe for each matrix of indicators, its penalty the best when each example is left out.

    Args:
      x: features whose means are 0.
      indicators: of each target, 1 where an example is of a class and 0 elsewhere.

    Raises:
      ValueError: fewer than three examples, or features that are not finite.
    """
    count = len(x)
    if count < 3:
        raise ValueError(f"{count} examples are too few to fit a probe")
    if not np.isfinite(x).all():
        raise ValueError("features are not finite: the model's parameters are broken")
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    penalties = np.array(PENALTIES) * count
    shrink = s**2 / (s**2 + penalties[:, None])  # [P, R]
    # The diagonal of the map from labels to fitted labels, the mean's share in it.
    leverage = 1 / count + shrink @ (u**2).T  # [P, I]
    probes = []
    for y in indicators:
        bias = y.mean(0)
        turned = u.T @ (y - bias)  # [R, C]
        errors = []
        for share, own in zip(shrink, leverage, strict=True):
            left = (y - bias - u @ (share[:, None] * turned)) / np.maximum(1 - own, 1e-9)[:, None]
            errors.append(float(np.square(left).mean()))
        best = int(np.argmin(errors))
        inverse = s / (s**2 + penalties[best])
        weights = vt.T @ (inverse[:, None] * turned)
        probes.append(Probe(weights, bias, float(penalties[best] / count)))
    return probes


def probe_layer(
    train: Float[np.ndarray, "I D"],
    test: Float[np.ndarray, "J D"],
    targets: Sequence[Target],
    test_targets: Sequence[Target],
) -> dict[str, float]:
    """By name of each target, the share of test examples whose class the probe tells.

    Raises:
      ValueError: as `ridge_probes` does, or targets that are not those of the examples.
    """
    check(train, targets)
    check(test, test_targets)
    known = Standardised.of(train)
    indicators = [np.eye(len(each.classes))[each.labels] for each in targets]
    probes = ridge_probes(known.values, indicators)
    asked = known.other(test.astype(np.float64))
    return {
        target.name: float(np.mean((asked @ p.weights + p.bias).argmax(1) == target.labels))
        for p, target in zip(probes, test_targets, strict=True)
    }


def check(x: Float[np.ndarray, "I D"], targets: Sequence[Target]) -> None:
    """Raises ValueError where a target has not one label for each example."""
    for target in targets:
        if len(target.labels) != len(x):
            raise ValueError(
                f"{target.name}: {len(target.labels)} labels of {len(x)} examples: give one each"
            )


def probe_layers(learned: Labelled, asked: Labelled) -> dict[str, dict[str, float]]:
    """By layer, accuracies by target (see `probe_layer`)."""
    return {
        layer: probe_layer(features, asked.features[layer], learned.targets, asked.targets)
        for layer, features in learned.features.items()
    }


def chance(learned: Labelled) -> dict[str, float]:
    """What guessing among the classes scores, by target."""
    return {target.name: 1 / len(target.classes) for target in learned.targets}


def majority(learned: Labelled, asked: Labelled) -> dict[str, float]:
    """What always naming the class that is the most frequent in training scores, by target."""
    scores = {}
    for target, other in zip(learned.targets, asked.targets, strict=True):
        usual = np.bincount(target.labels, minlength=len(target.classes)).argmax()
        scores[target.name] = float(np.mean(other.labels == usual))
    return scores


def grouped(scores: Mapping[str, float]) -> dict[str, float]:
    """Means over targets that share the part of their name before the slash."""
    groups: dict[str, list[float]] = {}
    for name, value in scores.items():
        groups.setdefault(name.partition("/")[0], []).append(value)
    return {name: float(np.mean(values)) for name, values in groups.items()}


def yes_or_no(name: str, holds: Bool[np.ndarray, " I"]) -> Target:
    """Whether something holds of each example."""
    return Target(name, ("no", "yes"), holds.astype(np.int64))
