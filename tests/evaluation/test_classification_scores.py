"""Scores of classes against scikit-learn's, and by hand."""

import numpy as np
import pytest
import tiny

from unified_mm.data.records import Manifest, Record
from unified_mm.evaluation.classification import (
    area_under_curve,
    average_precision,
    many_class_scores,
    one_class_scores,
)
from unified_mm.evaluation.directions import higher_is_better
from unified_mm.evaluation.evaluate import Split, check_split

OTHERS = ("captioning", "contrastive", "matching")
MANY = {
    "objectives__classification__weight": 1.0,
    "objectives__classification__many": True,
    "objectives__classification__classes": ("a", "b"),
}


def drawn(seed, ties):
    rng = np.random.default_rng(seed)
    scores = rng.uniform(size=(200, 6))
    labels = rng.uniform(size=(200, 6)) < 0.2 + 0.5 * scores * rng.uniform(size=6)
    return (np.round(scores, 1) if ties else scores), labels


@pytest.mark.parametrize("ties", [False, True])
def test_equal_to_scikit_learns(ties):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels = drawn(0, ties)
    found, chance = many_class_scores(scores, labels)
    assert found["map"] == pytest.approx(
        metrics.average_precision_score(labels, scores, average="macro"), abs=1e-9
    )
    assert found["auc"] == pytest.approx(
        metrics.roc_auc_score(labels, scores, average="macro"), abs=1e-9
    )
    assert chance["map"] == pytest.approx(labels.mean())


def test_by_hand():
    scores, truth = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])
    assert average_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)
    assert area_under_curve(scores, truth) == 0.75
    assert area_under_curve(np.zeros(4), truth) == 0.5
    # d' of an area of 0.760: two normals one deviation apart.
    rows = np.random.default_rng(0).normal(size=(40_000, 2))
    labels = np.arange(40_000)[:, None] % 2 == np.array([0, 1])
    found, _ = many_class_scores(rows + labels, labels)
    assert found["d_prime"] == pytest.approx(1.0, abs=0.03)


def test_classes_that_all_or_none_have_are_left_out():
    scores, labels = drawn(1, False)
    labels[:, 2], labels[:, 4] = True, False
    kept = [0, 1, 3, 5]
    assert many_class_scores(scores, labels) == many_class_scores(scores[:, kept], labels[:, kept])
    with pytest.raises(ValueError, match="no class is there in some"):
        many_class_scores(scores[:, [2]], labels[:, [2]])


def test_classes_that_are_not_known_leave_numbers():
    found, chance = one_class_scores(np.eye(3), np.zeros((3, 3), bool), ["a", "b", "c"])
    assert found == {"accuracy": 0.0} and chance == {"accuracy": 0.0}


def test_a_part_of_a_folder_of_classes_has_them_all():
    """Folders list them class by class."""
    records = tuple(
        Record(f"{name}{number}", {}, (), False, (name,)) for name in "abc" for number in range(4)
    )
    cut = Split(Manifest("val", records, "", "", "")).first(6)
    assert [record.labels[0] for record in cut.manifest.records] == list("aabbcc")


def test_tags_that_tell_nothing_apart_are_refused_before_training():
    task = tiny.task(**{f"objectives__{name}__weight": 0.0 for name in OTHERS}, **MANY)
    for labels in ((), ("a",)):
        records = tuple(Record(n, {"image": "x"}, (), False, labels) for n in range(3))
        with pytest.raises(ValueError, match="no class of objectives.classification is there in"):
            check_split(Split(Manifest("val", records, "", "", "")), task)


def test_one_class_each():
    scores = np.array([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.1, 0.9, 0], [0.3, 0.3, 0.4]])
    labels = np.eye(3, dtype=bool)[[0, 1, 1, 2]]
    found, chance = one_class_scores(scores, labels, ["a", "b", "c"])
    assert found["accuracy"] == 0.75 and found["accuracy/b"] == 0.5
    assert found["mean_per_class"] == pytest.approx(5 / 6)
    assert chance["accuracy"] == 0.5 and chance["mean_per_class"] == pytest.approx(1 / 3)


def test_more_is_better():
    for name in ("classification/map", "tags/auc", "tags/d_prime", "classification/accuracy/dog"):
        assert higher_is_better(name)
