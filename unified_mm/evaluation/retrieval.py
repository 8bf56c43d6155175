"""Image-text retrieval: ranks, recalls, chance level and the ceiling of duplicate captions.

Ranks start at 1. All captions count: the five-caption protocol of MS-COCO retrieval
(Karpathy and Fei-Fei 2015, section 4.2).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

RECALL_AT = (1, 5, 10)

# Scores closer than this share of the largest possible score are ties. It lies above what the
# order of a float64 sum can change and below any difference that float32 embeddings can express.
_TIE = 1e-10


class Ranks(NamedTuple):
    """The ranks of the right answers, from 1.

    Attributes:
      text_to_image: for each caption, the rank of its image.
      image_to_text: for each image that has a caption, the rank of its best caption.
    """

    text_to_image: Int[np.ndarray, " captions"]
    image_to_text: Int[np.ndarray, " captioned_images"]


def ranks(
    images: Float[np.ndarray, "images Z"],
    texts: Float[np.ndarray, "captions Z"],
    image_of_text: Int[np.ndarray, " captions"],
    *,
    block_size: int = 256,
) -> Ranks:
    """Returns the rank of every caption's image and of every image's best caption.

    Candidates are ranked by inner product. A rank is one more than the number of wrong candidates
    that score at least as high as the right one, so ties count against the model. Other captions
    of the same image do not compete. An image without a caption is a wrong candidate for every
    text and no query.

    Args:
      images: image embeddings [images, Z].
      texts: caption embeddings [captions, Z].
      image_of_text: index of each caption's image [captions].
      block_size: images compared at a time; memory is `block_size * captions` float64.

    Raises:
      ValueError: embeddings are not finite, there are no captions, or an index is out of range.
    """
    _check_embeddings(images, texts, image_of_text)
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    tie = _TIE * _largest_norm(images) * _largest_norm(texts)
    bar = np.einsum("CD,CD->C", images[image_of_text], texts) - tie

    text_ranks = np.ones(len(texts), np.int64)
    image_ranks = np.ones(len(images), np.int64)
    for start in range(0, len(images), block_size):
        block = np.arange(start, min(start + block_size, len(images)))
        scores = images[block] @ texts.T
        own = block[:, None] == image_of_text
        text_ranks += np.sum((scores >= bar) & ~own, axis=0)
        best_own = np.max(scores, axis=1, initial=-np.inf, where=own, keepdims=True)
        image_ranks[block] += np.sum((scores >= best_own - tie) & ~own, axis=1)
    return Ranks(text_ranks, image_ranks[np.unique(image_of_text)])


def retrieval_scores(
    images: Float[np.ndarray, "images Z"],
    texts: Float[np.ndarray, "captions Z"],
    image_of_text: Int[np.ndarray, " captions"],
) -> dict[str, float]:
    """Returns recall at 1, 5, 10 and median rank in both directions.

    Arguments and errors are those of `ranks`.

    Returns:
      `{text_to_image,image_to_text}/{recall_at_1,recall_at_5,recall_at_10,median_rank}`:
      recalls are fractions, median ranks start at 1.
    """
    return _summary(ranks(images, texts, image_of_text))


def chance(image_of_text: Int[np.ndarray, " captions"], image_count: int) -> dict[str, float]:
    """Returns the mean scores of a uniformly random ranking, named as in `retrieval_scores`.

    An image with c of all n captions misses the first k places with the hypergeometric
    probability `binom(n - c, k) / binom(n, k)`, which is averaged over the images. The median
    rank is that of the resulting distribution.

    Raises:
      ValueError: there are no captions, or an index is out of range.
    """
    _check_index(image_of_text, image_count)
    captions_of_image = np.bincount(image_of_text, minlength=image_count)
    captions_of_image = captions_of_image[captions_of_image > 0]
    misses = {
        "text_to_image": _miss_probability(image_count, np.ones(1, np.int64)),
        "image_to_text": _miss_probability(len(image_of_text), captions_of_image),
    }
    scores = {}
    for direction, miss in misses.items():
        for k in RECALL_AT:
            scores[f"{direction}/recall_at_{k}"] = float(1 - miss[min(k, len(miss) - 1)])
        scores[f"{direction}/median_rank"] = _median_of_distribution(miss)
    return scores


def duplicate_caption_ceiling(
    texts: Sequence[str], image_of_text: Int[np.ndarray, " captions"]
) -> dict[str, float]:
    """Returns the upper bound that identical captions of several images set.

    Text to image: equal strings get equal rankings, so the best any model can do is to put the
    images that own a string first, the most frequent owner foremost; where each of m images owns
    it once that is a fair guess, min(k / m, 1). Image to text: equal strings tie, and ties count
    against the model, so an image is best served by its caption with the fewest copies elsewhere.

    Args:
      texts: the captions as the model reads them (lower-cased, if its tokenizer does that).
      image_of_text: index of each caption's image [captions].

    Returns:
      The bounds, named as in `retrieval_scores`.

    Raises:
      ValueError: there are no captions, lengths differ, or an index is negative.
    """
    if len(texts) != len(image_of_text):
        raise ValueError(
            f"{len(texts)} texts but {len(image_of_text)} image indices: give one index per text."
        )
    _check_index(image_of_text, int(np.max(image_of_text, initial=0)) + 1)
    owners: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for text, image in zip(texts, image_of_text.tolist(), strict=True):
        owners[text][image] += 1

    place = {
        text: {image: rank for rank, (image, _) in enumerate(count.most_common(), start=1)}
        for text, count in owners.items()
    }
    best_of_image: dict[int, int] = {}
    for count in owners.values():
        for image, copies in count.items():
            rank = 1 + count.total() - copies
            best_of_image[image] = min(rank, best_of_image.get(image, rank))
    return _summary(
        Ranks(
            np.array([place[t][i] for t, i in zip(texts, image_of_text.tolist(), strict=True)]),
            np.array(list(best_of_image.values())),
        )
    )


def _summary(found: Ranks) -> dict[str, float]:
    scores = {}
    for direction, rank in found._asdict().items():
        for k in RECALL_AT:
            scores[f"{direction}/recall_at_{k}"] = float(np.mean(rank <= k))
        scores[f"{direction}/median_rank"] = float(np.median(rank))
    return scores


def _miss_probability(
    total: int, right: Int[np.ndarray, " queries"]
) -> Float[np.ndarray, " total_plus_1"]:
    """Returns P(no right answer among the first k of a random order) for k = 0 to `total`.

    It is the mean over queries with `right` right answers each.
    """
    sizes, weights = np.unique(right, return_counts=True)
    k = np.arange(total)
    still_wrong = np.clip((total - sizes[:, None] - k) / (total - k), 0, 1)
    miss = np.cumprod(still_wrong, axis=1)
    return np.concatenate([[1.0], np.average(miss, axis=0, weights=weights)])


def _median_of_distribution(miss: Float[np.ndarray, " ranks"]) -> float:
    """Returns the median rank where `miss[k] = P(rank > k)`: midway between lower and upper one."""
    rounding = 1e-12
    lower = np.argmax(miss <= 0.5 + rounding)
    upper = np.argmax(miss < 0.5 - rounding)
    return float(lower + upper) / 2


def _largest_norm(embeddings: Float[np.ndarray, "rows Z"]) -> float:
    return float(np.sqrt(np.max(np.einsum("RD,RD->R", embeddings, embeddings))))


def _check_embeddings(
    images: Float[np.ndarray, "images Z"],
    texts: Float[np.ndarray, "captions Z"],
    image_of_text: Int[np.ndarray, " captions"],
) -> None:
    for name, embeddings in (("image", images), ("text", texts)):
        bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{len(bad)} of {len(embeddings)} {name} embeddings are not finite (first: row "
                f"{bad[0]}): ranks would mean nothing. Look for a diverged run or a bad input."
            )
    _check_index(image_of_text, len(images))


def _check_index(image_of_text: Int[np.ndarray, " captions"], image_count: int) -> None:
    if not len(image_of_text):
        raise ValueError("no captions: retrieval needs at least one image with a caption.")
    low, high = int(image_of_text.min()), int(image_of_text.max())
    if low < 0 or high >= image_count:
        raise ValueError(
            f"image_of_text holds {low if low < 0 else high}, but there are {image_count} images: "
            "indices must lie in [0, number of images)."
        )
