"""The controls beside models of photographs: regression to words, trigrams, recall."""

import numpy as np

from experiments.photograph_controls import Trigrams, nats, recalls, regression, shares


def test_trigrams_say_what_was_counted_and_fall_back_on_pairs():
    grams = Trigrams([[0, 1, 2, 3], [0, 1, 2, 4], [0, 5, 2, 4]], 6)
    single, pairs, threes = grams.parts([0, 1, 2, 4, 5])
    for each in (single, pairs, threes):
        np.testing.assert_allclose(each.sum(-1), 1)
    np.testing.assert_allclose(pairs[0], [0, 2 / 3, 0, 0, 0, 1 / 3])
    np.testing.assert_allclose(pairs[2], [0, 0, 0, 1 / 3, 2 / 3, 0])
    np.testing.assert_allclose(threes[2], [0, 0, 0, 1 / 2, 1 / 2, 0])
    np.testing.assert_allclose(threes[0], pairs[0])  # there are no two before it
    np.testing.assert_allclose(pairs[3], single[3])  # nothing came after 4


def test_nats_are_of_the_reweighed_mixture():
    grams = Trigrams([[0, 1, 2], [0, 2, 1]], 3)
    text, mixture, factor = [0, 1, 2], np.array([0.2, 0.3, 0.5]), np.array([1.0, 2.0, 3.0])
    parts, expected = grams.parts(text), []
    for place in (1, 2):
        chances = [factor[v] * (mixture @ parts[:, place - 1, v]) for v in range(3)]
        expected.append(-np.log(chances[text[place]] / sum(chances)))
    np.testing.assert_allclose(nats(parts, text, mixture, factor), np.mean(expected))


def test_a_regression_without_ridge_is_least_squares():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), rng.normal(size=(40, 3))
    design = np.c_[x, np.ones(40)]
    expected = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    np.testing.assert_allclose(regression(x, y, 0.0)(x), expected, atol=1e-4)


def test_recall_counts_pictures_above_the_right_one():
    held = shares([[["dog", "runs"], ["dog"]], [["cat"]]], {"dog": 0, "cat": 1, "runs": 2})
    np.testing.assert_allclose(held, [[1, 0, 0.5], [0, 1, 0]])
    asked = np.array([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])
    base, rarity = np.zeros(3), np.ones(3)
    # Among two pictures each is within the first ten; the last text asks for the wrong one.
    np.testing.assert_allclose(recalls(held, asked, np.array([0, 1, 1]), base, rarity), [2 / 3, 1])
