"""Probes against ridge regression and leaving examples out as they are written down."""

import numpy as np
import pytest

from unified_mm.analysis import probes
from unified_mm.analysis.probes import Labelled, Target, ridge_probes, standardised

RNG = np.random.default_rng(0)


def solved(x, y, penalty):
    """Weights and bias of ridge regression by its normal equations."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    left = (x - mean_x).T @ (x - mean_x) + penalty * np.eye(x.shape[1])
    weights = np.linalg.solve(left, (x - mean_x).T @ (y - mean_y))
    return weights, mean_y - mean_x @ weights


def left_out(x, y, penalty):
    """The mean squared error of each example by a model fitted on all others."""
    errors = []
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        weights, bias = solved(x[others], y[others], penalty)
        errors.append(x[i] @ weights + bias - y[i])
    return np.square(errors).mean()


@pytest.mark.parametrize("count", [12, 40])
def test_a_probe_is_ridge_regression_with_the_penalty_that_leaves_out_best(count):
    x = RNG.normal(size=(count, 20)) @ RNG.normal(size=(20, 20))
    x, _ = standardised(x, x)
    labels = (x[:, 0] + 0.5 * RNG.normal(size=count) > 0).astype(int)
    others = RNG.integers(0, 3, count)
    indicators = [np.eye(2)[labels], np.eye(3)[others]]
    for y, probe in zip(indicators, ridge_probes(x, indicators), strict=True):
        penalties = np.array(probes.PENALTIES)
        errors = [left_out(x, y, penalty * count) for penalty in penalties]
        assert probe.penalty == pytest.approx(penalties[np.argmin(errors)])
        weights, bias = solved(x, y, probe.penalty * count)
        np.testing.assert_allclose(probe.weights, weights, atol=1e-6)
        np.testing.assert_allclose(probe.bias, bias, atol=1e-6)


def test_what_is_linear_is_told_and_what_is_not_there_is_not():
    train, test = RNG.normal(size=(400, 8)), RNG.normal(size=(300, 8))

    def targets(x, random):
        three = np.digitize(x[:, 1], [-0.5, 0.5])
        return [
            probes.yes_or_no("side", x[:, 0] > 0),
            Target("third", ("a", "b", "c"), three),
            probes.yes_or_no("noise", random.random(len(x)) < 0.8),
        ]

    known, asked = targets(train, RNG), targets(test, RNG)
    layers = {"all": train, "none": RNG.normal(size=(400, 3))}
    tests = {"all": test, "none": RNG.normal(size=(300, 3))}
    known, asked = Labelled(layers, known), Labelled(tests, asked)
    found = probes.probe_layers(known, asked)
    assert list(found) == ["all", "none"]
    assert found["all"]["side"] > 0.9 and found["all"]["third"] > 0.6
    assert found["none"]["side"] < 0.62
    usual = probes.majority(known, asked)
    assert found["all"]["noise"] == pytest.approx(usual["noise"], abs=0.03) and usual["noise"] > 0.7
    assert probes.chance(known) == {"side": 0.5, "third": 1 / 3, "noise": 0.5}


def test_the_majority_is_that_of_training():
    known, asked = np.array([0, 0, 0, 1]), np.array([1, 1, 1, 0])
    named = [Labelled({}, [Target("x", ("a", "b"), each)]) for each in (known, asked)]
    assert probes.majority(*named) == {"x": 0.25} and len(named[0]) == 4


def test_a_feature_that_never_changes_counts_for_nothing():
    x = RNG.normal(size=(50, 3)).astype(np.float32)
    labels = [probes.yes_or_no("x", x[:, 0] > 0)]
    constant = np.concatenate([x, np.full((50, 1), 1e4, np.float32)], axis=1)
    moved = constant + np.array([0, 0, 0, 5], np.float32)
    for values in standardised(constant, moved):
        assert values[:, 3].tolist() == [0.0] * 50
    assert probes.probe_layer(constant, moved, labels, labels) == probes.probe_layer(
        x, x, labels, labels
    )


def test_scores_of_one_attribute_are_averaged():
    scores = {"colour/red": 0.5, "colour/blue": 0.7, "objects/count": 0.4, "class": 1.0}
    assert probes.grouped(scores) == {
        "colour": pytest.approx(0.6),
        "objects": pytest.approx(0.4),
        "class": 1.0,
    }


def test_what_cannot_be_fitted_is_refused():
    labels = [probes.yes_or_no("x", np.array([True, False]))]
    with pytest.raises(ValueError, match="2 examples are too few"):
        probes.probe_layer(np.zeros((2, 3)), np.zeros((2, 3)), labels, labels)
    with pytest.raises(ValueError, match="x: 2 labels of 5 examples"):
        probes.probe_layer(np.zeros((5, 3)), np.zeros((2, 3)), labels, labels)
    with pytest.raises(ValueError, match="not finite"):
        ridge_probes(np.full((5, 2), np.nan), [np.eye(2)[[0, 1, 0, 1, 0]]])
