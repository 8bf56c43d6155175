"""How well a search index finds: the recall of its graph, and mean average precision."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from unified_mm.search.nearest import Nearest
from unified_mm.search.search_index import SearchIndex

PLACES = 10
QUERIES = 1000  # drawn with a fixed seed, to compare with exact search
_TIE = 1e-6  # of scores: far below what float32 embeddings of different things differ by


class SearchScores(NamedTuple):
    """Scores by name, and what random guesses score on average, by the same names."""

    scores: dict[str, float]
    chance: dict[str, float]


def search_scores(index: SearchIndex) -> SearchScores:
    """Returns the scores of an index with its own vectors as queries.

    They are `index/A_to_B/recall_at_10`, the share of the exact ten nearest that the index finds,
    and, where it has texts, `text_to_A/map_at_10` and `A_to_text/map_at_10`, A being the modality.
    """
    nearest, of = index.nearest, index.of
    pairs = [(of, of)]
    if "text" in nearest:
        pairs += [("text", of), (of, "text")]
    scores, chances = {}, {}
    for asked, sought in pairs:
        name = f"index/{asked}_to_{sought}/recall_at_{PLACES}"
        scores[name] = recall_of_exact(nearest[sought], _drawn(nearest[asked].vectors), PLACES)
        chances[name] = min(1.0, PLACES / len(nearest[sought]))
    if "text" in nearest:
        for name, (value, chance) in _precisions(index).items():
            scores[name], chances[name] = value, chance
    return SearchScores(scores, chances)


def recall_of_exact(nearest: Nearest, queries: Float[np.ndarray, "queries Z"], k: int) -> float:
    """Returns the share of the k nearest that `nearest` finds.

    Whatever scores as high as the k-th nearest counts as one of them, for equals are as good.
    """
    exact = nearest.exact(queries, k).scores
    found = nearest.search(queries, k).scores
    return float(np.mean(found >= exact[:, -1:] - _TIE))


def average_precision(
    right: Bool[np.ndarray, "queries found"], total: Int[np.ndarray, " queries"], k: int
) -> Float[np.ndarray, " queries"]:
    """Returns the average precision at k of each query.

    This is the sum, over the right results among the first k, of the precision there, divided by
    the number of right answers or k, whichever is less, so that 1 can be reached (Manning et al.
    2008, Introduction to Information Retrieval, section 8.4, cut at k).

    Args:
      right: whether each result is right, best first.
      total: right answers that there are for each query, 1 or more.
    """
    right = right[:, :k]
    precision = np.cumsum(right, axis=1) / np.arange(1, right.shape[1] + 1)
    return np.sum(precision * right, axis=1) / np.minimum(total, k)


def chance_average_precision(
    total: Int[np.ndarray, " queries"], count: int, k: int
) -> Float[np.ndarray, " queries"]:
    """Returns the mean of `average_precision` over random orders of `count` candidates.

    With R right answers (`total`) among N candidates (`count`), result i is right with probability
    R / N; the i - 1 before it then hold (i - 1)(R - 1) / (N - 1) right ones on average.
    """
    place = np.arange(1, min(k, count) + 1)
    before = (place - 1) * (total[:, None] - 1) / max(1, count - 1)
    expected = np.sum((1 + before) / place, axis=1) * total / count
    return expected / np.minimum(total, k)


def _precisions(index: SearchIndex) -> dict[str, tuple[float, float]]:
    """Returns the mean average precision of both directions by name, each with that of chance."""
    items, texts = index.nearest[index.of], index.nearest["text"]
    owners = np.array(index.rows.owners)
    captions = np.bincount(owners, minlength=len(items))
    asking = np.flatnonzero(captions)
    to_item = items.search(np.asarray(texts.vectors), PLACES).numbers == owners[:, None]
    found = texts.search(np.asarray(items.vectors[asking]), PLACES).numbers
    to_text = owners[found] == asking[:, None]
    one = np.ones(len(owners), np.int64)
    measured = {
        f"text_to_{index.of}": (to_item, one, len(items)),
        f"{index.of}_to_text": (to_text, captions[asking], len(texts)),
    }
    return {
        f"{name}/map_at_{PLACES}": (
            float(np.mean(average_precision(right, total, PLACES))),
            float(np.mean(chance_average_precision(total, count, PLACES))),
        )
        for name, (right, total, count) in measured.items()
    }


def _drawn(vectors: Float[np.ndarray, "vectors Z"]) -> Float[np.ndarray, "queries Z"]:
    """Returns at most `QUERIES` of the vectors, without repetition, in their order."""
    if len(vectors) <= QUERIES:
        return np.asarray(vectors)
    chosen = np.random.default_rng(0).choice(len(vectors), QUERIES, replace=False)
    return np.asarray(vectors[np.sort(chosen)])
