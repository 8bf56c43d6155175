"""Linear probes: how well a linear map of one layer's features predicts a label.

Alain & Bengio 2017, "Understanding intermediate layers using linear classifier probes". A probe
says what can be read off a layer, not what the model does with it (Belinkov 2022, "Probing
classifiers", section 4).

A probe is ridge regression on indicators of the classes (Hastie et al. 2009, "The elements of
statistical learning", section 4.2), which has a closed form: one singular value decomposition of a
layer's features serves all its labels and penalties, and gives the exact leave-one-out errors (the
same book, section 7.10.1), by which the penalty is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

# Relative to the mean eigenvalue of the features' covariance: 1 where no feature is constant.
PENALTIES = tuple(10.0**power for power in range(-5, 3))


@dataclass(frozen=True)
class Target:
    """A label that a probe has to predict.

    Attributes:
      name: name of the label.
      classes: names of its classes.
      labels: index of each example's class [examples].
    """

    name: str
    classes: tuple[str, ...]
    labels: Int[np.ndarray, " examples"]


@dataclass(frozen=True)
class Labelled:
    """Features and labels of the same examples.

    Attributes:
      features: by layer, [examples, features].
      targets: the labels.
    """

    features: Mapping[str, Float[np.ndarray, "_ _"]]
    targets: Sequence[Target]

    def __len__(self) -> int:
        return len(self.targets[0].labels)


@dataclass(frozen=True)
class Probe:
    """A linear map to scores of classes: x @ weights + bias.

    Attributes:
      weights: [features, C].
      bias: [C].
      penalty: the chosen penalty; ridge regression adds it times the number of examples.
    """

    weights: Float[np.ndarray, "features C"]
    bias: Float[np.ndarray, " C"]
    penalty: float


def standardised(
    x: Float[np.ndarray, "examples features"], other: Float[np.ndarray, "others features"]
) -> tuple[Float[np.ndarray, "examples features"], Float[np.ndarray, "others features"]]:
    """Returns features, and those of other examples, less the mean of `x` over its deviation.

    A feature that is the same in all examples of `x` becomes 0 in both.
    """
    x, other = x.astype(np.float64), other.astype(np.float64)
    mean, deviation = x.mean(0), x.std(0)
    deviation = np.where(deviation > 1e-9 * (1 + np.abs(mean)), deviation, np.inf)
    return (x - mean) / deviation, (other - mean) / deviation


def ridge_probes(
    x: Float[np.ndarray, "examples features"], indicators: Sequence[Float[np.ndarray, "examples _"]]
) -> list[Probe]:
    """Fits a probe to each matrix of indicators, with the penalty of the least leave-one-out error.

    Args:
      x: features whose means are 0.
      indicators: for each target [examples, C], 1 where an example is of a class and 0 elsewhere.

    Raises:
      ValueError: there are fewer than three examples, or features are not finite.
    """
    count = len(x)
    if count < 3:
        raise ValueError(f"{count} examples are too few to fit a probe")
    if not np.isfinite(x).all():
        raise ValueError("features are not finite: the model's parameters are broken")
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    penalties = np.array(PENALTIES) * count
    shrink = s**2 / (s**2 + penalties[:, None])  # [penalties, rank]
    # The diagonal of the hat matrix (labels to fitted labels), including the mean's share.
    leverage = 1 / count + shrink @ (u**2).T  # [penalties, examples]
    probes = []
    for y in indicators:
        bias = y.mean(0)
        turned = u.T @ (y - bias)  # [rank, C]
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
    train: Float[np.ndarray, "train_examples features"],
    test: Float[np.ndarray, "test_examples features"],
    targets: Sequence[Target],
    test_targets: Sequence[Target],
) -> dict[str, float]:
    """Returns the share of test examples whose class the probe predicts, by name of each target.

    Raises:
      ValueError: `ridge_probes` refuses the features, or a target lacks one label per example.
    """
    check(train, targets)
    check(test, test_targets)
    known, asked = standardised(train, test)
    indicators = [np.eye(len(each.classes))[each.labels] for each in targets]
    probes = ridge_probes(known, indicators)
    return {
        target.name: float(np.mean((asked @ p.weights + p.bias).argmax(1) == target.labels))
        for p, target in zip(probes, test_targets, strict=True)
    }


def check(x: Float[np.ndarray, "examples features"], targets: Sequence[Target]) -> None:
    """Raises ValueError where a target does not have one label for each example."""
    for target in targets:
        if len(target.labels) != len(x):
            raise ValueError(
                f"{target.name}: {len(target.labels)} labels of {len(x)} examples: give one each"
            )


def probe_layers(learned: Labelled, asked: Labelled) -> dict[str, dict[str, float]]:
    """Returns the accuracies of `probe_layer`, by layer and target."""
    return {
        layer: probe_layer(features, asked.features[layer], learned.targets, asked.targets)
        for layer, features in learned.features.items()
    }


def chance(learned: Labelled) -> dict[str, float]:
    """Returns the accuracy of guessing among the classes, by target."""
    return {target.name: 1 / len(target.classes) for target in learned.targets}


def majority(learned: Labelled, asked: Labelled) -> dict[str, float]:
    """Returns the accuracy of always predicting the most frequent training class, by target."""
    scores = {}
    for target, other in zip(learned.targets, asked.targets, strict=True):
        usual = np.bincount(target.labels, minlength=len(target.classes)).argmax()
        scores[target.name] = float(np.mean(other.labels == usual))
    return scores


def grouped(scores: Mapping[str, float]) -> dict[str, float]:
    """Returns means over targets that share the part of their name before the slash."""
    groups: dict[str, list[float]] = {}
    for name, value in scores.items():
        groups.setdefault(name.partition("/")[0], []).append(value)
    return {name: float(np.mean(values)) for name, values in groups.items()}


def yes_or_no(name: str, holds: Bool[np.ndarray, " examples"]) -> Target:
    """Returns a target of two classes: whether something holds for each example."""
    return Target(name, ("no", "yes"), holds.astype(np.int64))
