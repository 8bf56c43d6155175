"""Scores of classes: accuracy; and of tagging the mean average precision, mAUC and d'.

`one` is of examples with one class each, `many` of any number, as AudioSet has it (Gemmeke et al.
2017, section 5): each is the mean over the classes that some example has and some has not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

Scores = tuple[dict[str, float], dict[str, float]]  # what is reached, and by chance


def one_class_scores(
    probabilities: Float[np.ndarray, "B C"], labels: Bool[np.ndarray, "B C"], names: Sequence[str]
) -> Scores:
    """Returns the accuracy, its mean over classes, and that of each class.

    By chance is the best that one answer for all reaches, and a guess of each class alike.
    """
    right = labels[np.arange(len(labels)), probabilities.argmax(1)]
    by_class = {
        f"accuracy/{name}": float(right[labels[:, i]].mean())
        for i, name in enumerate(names)
        if labels[:, i].any()
    }
    scores = {"accuracy": float(right.mean())}
    if by_class:  # else all examples are of classes that are not known
        scores |= {"mean_per_class": float(np.mean(list(by_class.values()))), **by_class}
    alike = dict.fromkeys(scores, 1 / len(names))
    return scores, alike | {"accuracy": float(labels.mean(0).max())}


def some_of(labels: Bool[np.ndarray, "B C"]) -> list[int]:
    """Returns the classes that some examples have and others have not: they alone can be scored."""
    return [i for i in range(labels.shape[1]) if 0 < labels[:, i].sum() < len(labels)]


def many_class_scores(
    probabilities: Float[np.ndarray, "B C"], labels: Bool[np.ndarray, "B C"]
) -> Scores:
    """Returns mAP, mAUC and d' = sqrt(2) times the normal quantile of mAUC.

    Raises:
      ValueError: every class has all examples or none.
    """
    from statistics import NormalDist

    scored = some_of(labels)
    if not scored:
        raise ValueError("no class is there in some of the examples and not in others")
    precisions = [average_precision(probabilities[:, i], labels[:, i]) for i in scored]
    area = float(np.mean([area_under_curve(probabilities[:, i], labels[:, i]) for i in scored]))
    bounded = min(max(area, 1e-9), 1 - 1e-9)  # the quantile of 1 is infinite
    found = {
        "map": float(np.mean(precisions)),
        "auc": area,
        "d_prime": float(2**0.5 * NormalDist().inv_cdf(bounded)),
    }
    chance = {"map": float(labels[:, scored].mean()), "auc": 0.5, "d_prime": 0.0}
    return found, chance


def average_precision(scores: Float[np.ndarray, " B"], truth: Bool[np.ndarray, " B"]) -> float:
    """Returns the area under the steps of precision over recall; equal scores are one step."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of each run of equal scores
    found = np.cumsum(truth[order])[last]
    precision = found / (np.flatnonzero(last) + 1)
    return float(np.sum(np.diff(found, prepend=0) * precision) / truth.sum())


def area_under_curve(scores: Float[np.ndarray, " B"], truth: Bool[np.ndarray, " B"]) -> float:
    """Returns how often one of the class scores above one that is not; equal scores are half."""
    _, rank_of, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[rank_of]
    positives, negatives = int(truth.sum()), int((~truth).sum())
    above = ranks[truth].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))
