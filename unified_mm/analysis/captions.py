"""Captions one by one: the best and the worst, and scores by attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from unified_mm.analysis.intervals import Mean, mean_interval
from unified_mm.evaluation.caption_scores import (
    characters,
    cider_d_per_image,
    tokenize,
    without_spaces,
)


@dataclass(frozen=True)
class Judged:
    """A caption with its score.

    Attributes:
      place: index of its image among those that were scored.
      caption: the caption.
      references: the reference captions of its image.
      cider_d: CIDEr-D, in [0, 10], over characters in languages that set no words apart.
    """

    place: int
    caption: str
    references: tuple[str, ...]
    cider_d: float


def judge(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Judged]:
    """Returns each caption with its own CIDEr-D, in order.

    The score of one depends on the others: words that many references hold count for less.

    Raises:
      ValueError: there is no caption, lengths differ, or an image has no reference.
    """
    judged = zip(captions, references, cider_d(captions, references), strict=True)
    return [
        Judged(place, caption, tuple(texts), float(score))
        for place, (caption, texts, score) in enumerate(judged)
    ]


def cider_d(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> Float[np.ndarray, " images"]:
    """Returns the CIDEr-D of each caption, beside the references of its image.

    It is over characters where the references set no words apart, as `characters/cider_d` is.
    """
    split = characters if without_spaces(references) else tokenize
    return cider_d_per_image(
        [split(text) for text in captions],
        [[split(text) for text in texts] for texts in references],
    )


def best_and_worst(judged: Sequence[Judged], count: int) -> tuple[list[Judged], list[Judged]]:
    """Returns the `count` best captions, best first, and the `count` worst, worst first.

    Ties keep their order.
    """
    best = sorted(judged, key=lambda each: -each.cider_d)[:count]
    worst = sorted(judged, key=lambda each: each.cider_d)[:count]
    return best, worst


def scores(judged: Sequence[Judged]) -> Float[np.ndarray, " images"]:
    """Returns the CIDEr-D of each caption."""
    return np.array([each.cider_d for each in judged])


def by_group(
    scores: Float[np.ndarray, " images"], groups: Mapping[str, Bool[np.ndarray, " images"]]
) -> dict[str, Mean]:
    """Returns the mean score of each group's images, with its 95% interval.

    Empty groups are left out. Groups may overlap: an image with a red and a blue object is in
    both.
    """
    return {name: mean_interval(scores[own]) for name, own in groups.items() if own.any()}
