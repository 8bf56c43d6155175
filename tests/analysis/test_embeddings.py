"""Measures of the shared space against their definitions, pair by pair."""

import math

import numpy as np
import pytest

from unified_mm.analysis.embeddings import (
    alignment,
    modality_gap,
    nearest,
    principal_plane,
    uniformity,
)


def unit(rows, width=5, seed=0):
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_measures_are_their_definitions():
    images, texts = unit(7), unit(7, seed=1)
    gap = [np.mean([x[e] for x in images]) - np.mean([x[e] for x in texts]) for e in range(5)]
    assert modality_gap(images, texts) == pytest.approx(math.hypot(*gap), abs=1e-6)
    squares = [sum((a - b) ** 2 for a, b in zip(x, y)) for x, y in zip(images, texts)]
    assert alignment(images, texts) == pytest.approx(np.mean(squares), abs=1e-6)
    potentials = [
        math.exp(-2 * sum((a - b) ** 2 for a, b in zip(images[i], images[j])))
        for i in range(7)
        for j in range(i)
    ]
    assert uniformity(images) == pytest.approx(math.log(np.mean(potentials)), abs=1e-6)


def test_known_answers():
    north, south = np.tile([0.0, 1.0], (4, 1)), np.tile([0.0, -1.0], (4, 1))
    assert modality_gap(north, south) == 2 and alignment(north, south) == 4
    assert modality_gap(north, north) == 0 and uniformity(north) == 0
    # Two opposite points: one pair, at a distance of 2.
    assert uniformity(np.array([[0.0, 1.0], [0.0, -1.0]])) == pytest.approx(-8)


def test_neighbours_best_first():
    vectors = np.array([[1, 0], [0, 1], [1, 0], [-1, 0]], np.float32)
    places, products = nearest(np.array([[1, 0], [0, 1]], np.float32), vectors, 3)
    assert places.tolist() == [[0, 2, 1], [1, 0, 2]]
    assert products.tolist() == [[1, 1, 0], [1, 0, 0]]


def test_the_plane_keeps_distances_within_it():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0][:2]
    flat = rng.normal(size=(9, 2)) @ basis
    (first, second), share = principal_plane(flat[:4], flat[4:])
    assert share == pytest.approx(1) and first.shape == (4, 2) and second.shape == (5, 2)
    found = np.concatenate([first, second])
    for i in range(9):
        distances = np.linalg.norm(found - found[i], axis=1)
        np.testing.assert_allclose(distances, np.linalg.norm(flat - flat[i], axis=1), atol=1e-9)


def test_what_has_no_pairs_is_refused():
    with pytest.raises(ValueError, match="7 images and 6 texts are no pairs"):
        alignment(unit(7), unit(6))
    with pytest.raises(ValueError, match="1 vectors have no pairs"):
        uniformity(unit(1))
