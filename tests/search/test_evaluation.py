"""Scores of a search index against definitions written out."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from unified_mm.search.evaluation import (
    average_precision,
    chance_average_precision,
    recall_of_exact,
    search_scores,
)
from unified_mm.search.nearest import Found, Nearest
from unified_mm.search.search_index import Rows, SearchIndex


def oracle_precision(right, total, k):
    """Average precision of one query, place by place."""
    summed, seen = 0.0, 0
    for place, is_right in enumerate(right[:k], start=1):
        if is_right:
            seen += 1
            summed += seen / place
    return summed / min(total, k)


def test_average_precision_is_as_defined():
    rng = np.random.default_rng(0)
    right = rng.random((50, 12)) < 0.3
    total = right.sum(axis=1) + rng.integers(1, 4, 50)
    for k in (1, 5, 10):
        expected = [oracle_precision(row, n, k) for row, n in zip(right.tolist(), total.tolist())]
        np.testing.assert_allclose(average_precision(right, total, k), expected)
    first = np.array([[True, True, False], [False, False, True]])
    expected = [1, 1 / 3]
    np.testing.assert_allclose(average_precision(first, np.array([2, 1]), 10), expected)


@pytest.mark.parametrize(("count", "total", "k"), [(5, 1, 3), (5, 2, 3), (6, 4, 3), (4, 2, 10)])
def test_chance_is_the_mean_over_all_orders(count, total, k):
    answers = [True] * total + [False] * (count - total)
    orders = np.array(list(itertools.permutations(answers)))
    mean = np.mean([oracle_precision(order, total, k) for order in orders.tolist()])
    found = chance_average_precision(np.array([total]), count, k)
    np.testing.assert_allclose(found, [mean])


def unit(rng, *shape):
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def index():
    """Thirty pictures, the first three without a text; others with one to three."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(3, 30), 1 + np.arange(27) % 3)
    images = unit(rng, 30, 8)
    texts = unit(rng, len(owners), 8) + images[owners]
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    rows = Rows([""] * 30, [0] * 30, [""] * len(owners), owners.tolist())
    nearest = {"image": Nearest(images), "text": Nearest(texts)}
    return SearchIndex(Path(), {}, rows, Path(), nearest)


def test_both_directions_are_scored(index):
    images, texts = (index.nearest[kind].vectors.astype(np.float64) for kind in ("image", "text"))
    owners = index.rows.owners
    to_image = [
        oracle_precision([i == owners[t] for i in np.argsort(-images @ texts[t])], 1, 10)
        for t in range(len(texts))
    ]
    to_text = [
        oracle_precision([owners[t] == i for t in np.argsort(-texts @ images[i])], n, 10)
        for i in range(30)
        if (n := owners.count(i))
    ]
    found = search_scores(index)
    assert found.scores["text_to_image/map_at_10"] == pytest.approx(np.mean(to_image))
    assert found.scores["image_to_text/map_at_10"] == pytest.approx(np.mean(to_text))
    assert set(found.chance) == set(found.scores)
    assert all(0 < found.chance[name] < found.scores[name] for name in found.chance)
    for pair in ("image_to_image", "text_to_image", "image_to_text"):
        assert found.scores[f"index/{pair}/recall_at_10"] == 1


def test_a_folder_without_captions_has_recall_alone(index):
    index.nearest.pop("text")
    assert list(search_scores(index).scores) == ["index/image_to_image/recall_at_10"]


def test_what_a_graph_misses_is_counted_and_equals_are_as_good():
    vectors = unit(np.random.default_rng(0), 40, 8)
    vectors[20:] = vectors[:20]

    class Missing(Nearest):
        def search(self, queries, count):
            found = self.exact(queries, count + 2)  # the nearest two are overlooked
            return Found(found.numbers[:, 2:], found.scores[:, 2:])

    class Other(Nearest):
        def search(self, queries, count):
            found = self.exact(queries, count)
            return Found((found.numbers + 20) % 40, found.scores)

    assert recall_of_exact(Missing(vectors), vectors[:5], 10) == pytest.approx(0.8)
    assert recall_of_exact(Other(vectors), vectors[:5], 10) == 1
