"""The nearest vectors, compared with NumPy's."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from unified_mm.search.nearest import Nearest, write_vectors


def unit_vectors(count, width=16, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


VECTORS = unit_vectors(2000)
QUERIES = unit_vectors(40, seed=1)


@pytest.fixture(scope="module", params=["all compared", "a graph"])
def nearest(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    few = len(VECTORS) if request.param == "all compared" else len(VECTORS) - 1
    parts = np.array_split(VECTORS, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 1)  # several threads join another graph each time
        write_vectors(folder, "image", parts, VECTORS.shape, exact_up_to=few)
    return Nearest.open(folder, "image")


def oracle(queries, count):
    scores = np.array([[float(np.dot(v, q)) for v in VECTORS] for q in queries.astype(np.float64)])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(scores, order, axis=1)


def test_they_are_found_with_their_cosines(nearest, request):
    numbers, scores = oracle(QUERIES, 10)
    found = nearest.search(QUERIES, 10)
    kept = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.numbers, numbers)])
    assert kept == 1 if nearest.graph is None else kept > 0.98
    exact = nearest.exact(QUERIES, 10)
    np.testing.assert_array_equal(exact.numbers, numbers)
    np.testing.assert_allclose(exact.scores, scores, atol=1e-6)
    for query, row, values in zip(QUERIES, found.numbers, found.scores):
        np.testing.assert_allclose(VECTORS[row] @ query, values, atol=1e-6)  # not the rounded ones
        assert (np.diff(values) <= 0).all()


@pytest.mark.parametrize("count", [1, 1999, 2000, 5000])
def test_any_number_of_them(nearest, count):
    found = nearest.search(QUERIES[:2], count)
    assert found.numbers.shape == found.scores.shape == (2, min(count, 2000))
    assert all(len(set(row)) == len(row) for row in found.numbers.tolist())
    if count >= 2000:
        np.testing.assert_array_equal(found.numbers, oracle(QUERIES[:2], 2000)[0])


def test_threads_get_what_one_gets(nearest):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: nearest.search(QUERIES[i : i + 1], 5), [*range(40)] * 3))
    alone = nearest.search(QUERIES, 5)
    for place, (numbers, scores) in enumerate(found):
        np.testing.assert_array_equal(numbers[0], alone.numbers[place % 40])
        np.testing.assert_allclose(scores[0], alone.scores[place % 40], atol=1e-6)


def test_equals_come_by_number(tmp_path):
    write_vectors(tmp_path, "text", [VECTORS[:1]] * 4, (4, 16))
    found = Nearest.open(tmp_path, "text").search(VECTORS[:1], 4)
    assert found.numbers.tolist() == [[0, 1, 2, 3]]


def test_many_queries_are_compared_in_parts(nearest, monkeypatch):
    whole = nearest.exact(QUERIES, 10)
    monkeypatch.setattr("unified_mm.search.nearest._SCORES_AT_ONCE", 3 * len(VECTORS))
    np.testing.assert_array_equal(nearest.exact(QUERIES, 10).numbers, whole.numbers)


def test_a_number_of_vectors_that_did_not_come_is_refused(tmp_path):
    with pytest.raises(ValueError, match="9 of 10 vectors came"):
        write_vectors(tmp_path, "image", [VECTORS[:9]], (10, 16))


def test_what_is_needed_and_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    write_vectors(tmp_path, "image", [VECTORS[:9]], (9, 16))  # all compared: not needed
    with pytest.raises(ValueError, match=r"pip install 'unified_mm\[search\]'"):
        write_vectors(tmp_path, "text", [VECTORS[:9]], (9, 16), exact_up_to=8)
