"""Filters that ask a model: what looks alike to it goes, and what captions fit worst."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from old_torch import old_file, weights, written
from PIL import Image

from unified_mm.data.cleaning import Pictures, read_filter
from unified_mm.data.records import Record, Text
from unified_mm.inference.loaded import LoadedModel
from unified_mm.search import cleaning
from unified_mm.search.cleaning import Alike, agreement, clustered, near_ones, normalised, stem_of


def vectors_of(seed, count, width=8):
    return normalised(np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32))


def pictures_of(count, scored=0, texts=()):
    """Examples named by their numbers, the first ones scored on."""
    records = tuple(
        Record(i, {"image": f"{i}.jpg"}, tuple(Text("", text) for text in texts), True)
        for i in range(count)
    )
    splits = ("val",) * scored + ("train",) * (count - scored)
    trained = np.array([split == "train" for split in splits])
    sizes, small = np.full((count, 2), 8), np.zeros((count, 32, 32, 3), np.uint8)
    return Pictures(splits, records, trained, (b"",) * count, sizes, small)


@dataclass(frozen=True)
class Given(Alike):
    """Embeds nothing: picture i has vector i of `vectors`."""

    vectors: tuple = ()

    def embed(self, files):
        return np.array(self.vectors)[[int(file.removesuffix(".jpg")) for file in files]]


def test_near_ones_are_all_pairs_that_are_near(monkeypatch):
    monkeypatch.setattr(cleaning, "BLOCK", 7)
    vectors = vectors_of(0, 30)
    distances = 1 - vectors @ vectors.T
    wanted = {(i, j) for i in range(30) for j in range(i) if distances[i, j] <= 0.5}
    found = {(i, j): distance for i, j, distance in near_ones(vectors, 0.5)}
    assert set(found) == wanted and len(wanted) > 10
    assert all(abs(distance - distances[pair]) < 1e-6 for pair, distance in found.items())


def test_up_to_a_size_all_are_compared_and_beyond_it_neighbours_stay_together():
    centres = np.eye(8, dtype=np.float32)[:3]
    vectors = normalised(np.repeat(centres, 20, 0) + 0.05 * vectors_of(1, 60))
    assert not clustered(vectors, 60).any()
    members = clustered(vectors, 20)
    assert all(len(set(members[i : i + 20])) == 1 for i in (0, 20, 40))
    assert np.array_equal(members, clustered(vectors, 20))


def test_what_is_scored_on_stays_and_what_is_like_it_goes():
    first, other = np.eye(8, dtype=np.float32)[:2]
    vectors = (first, first, other, normalised((other + 0.1 * first)[None])[0], other)
    pictures = pictures_of(5, scored=2)
    found = list(Given(0.01, "given", vectors=vectors)(pictures))
    said = {(case.place, case.other, case.measure <= 0.01): pictures.told(case) for case in found}
    assert said == {
        (3, 2, True): "alike train/2",
        (4, 2, True): "alike train/2",
        (4, 3, True): "alike train/3",
    }
    pictures = pictures_of(5, scored=4)
    found = list(Given(0.01, "given", vectors=vectors)(pictures))
    assert {pictures.told(case) for case in found} == {
        "alike val/2, which is scored on",
        "alike val/3, which is scored on",
    }


class Knowing(LoadedModel):
    """A model to which picture i is vector i, and a text the vector of its number."""

    def __init__(self):
        pass

    def embed_files(self, files, of="image"):
        return (
            files,
            np.eye(8, dtype=np.float32)[[int(file.removesuffix(".jpg")) for file in files]],
            [],
        )

    def embed_texts(self, texts):
        return np.eye(8, dtype=np.float32)[[int(text) for text in texts]]


def test_agreement_is_the_mean_over_captions():
    captions = [["0", "0"], ["0", "1"], ["2"], ["7", "6", "5", "3"]]
    found = agreement(Knowing(), [f"{i}.jpg" for i in range(4)], captions)
    np.testing.assert_allclose(found, [1, 0.5, 1, 0.25])


def test_the_share_that_fits_worst_is_mismatched(monkeypatch):
    monkeypatch.setattr(cleaning, "load", lambda run: Knowing())
    pictures = pictures_of(8, scored=2, texts=("5", "6"))
    for given, dropped in (("0.2", {2}), ("0.5", {2, 3, 4})):
        each = read_filter(f"mismatched,run=runs/1,threshold={given}")[1]
        cases = list(each(pictures))
        assert {case.place for case in cases if case.measure <= each.threshold} == dropped
    each = read_filter("mismatched,run=runs/1,by=cosine,threshold=0.25")[1]
    assert [case.place for case in each(pictures) if case.measure <= 0.25] == [2, 3, 4, 7]


def test_a_picture_that_the_run_cannot_read_is_named(monkeypatch):
    class Refusing(Knowing):
        def embed_files(self, files, of="image"):
            return (
                [],
                np.zeros((0, 8), np.float32),
                [SimpleNamespace(file="2.jpg", what="too small")],
            )

    monkeypatch.setattr(cleaning, "load", lambda run: Refusing())
    with pytest.raises(ValueError, match=r"2.jpg: too small"):
        list(Alike(run="runs/1")(pictures_of(3)))


def test_sounds_are_alike_where_a_run_hears_them_so(monkeypatch):
    monkeypatch.setattr(cleaning, "load", lambda run: Knowing())
    parts = ({"audio": "3.jpg"}, {"image": "3.jpg"}, {"audio": "4.jpg"}, {"audio": "3.jpg"})
    records = tuple(Record(place, each, (), True) for place, each in enumerate(parts))
    pictures = replace(pictures_of(4, scored=1), records=records)
    (case,) = Alike(run="runs/1", of="audio")(pictures)
    assert (case.place, case.other) == (3, 0) and "which is scored on" in pictures.told(case)
    with pytest.raises(ValueError, match="of=audio: package:eyes/x sees pictures; give a run"):
        Alike(run="package:eyes/x", of="audio")


def test_a_filter_that_asks_a_run_wants_one():
    assert read_filter("alike,run=runs/1,threshold=0.02")[1] == Alike(0.02, "runs/1")
    for given, named in (
        ("alike", "run=runs/1"),
        ("mismatched", "run=runs/1"),
        ("mismatched,run=runs/1,by=size", "one of share, cosine"),
    ):
        with pytest.raises(ValueError, match=named):
            read_filter(given)


def test_a_stem_sees_a_picture_as_the_mean_of_its_last_grid(tmp_path):
    written(tmp_path / "eyes", old_file(weights()))
    files = []
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 256, (48, 40, 3), dtype=np.uint8)
        files.append(str(tmp_path / f"{seed}.png"))
        Image.fromarray(noise).save(files[-1])
    embed = stem_of(str(tmp_path / "eyes"), 40)
    vectors = embed(files)
    assert vectors.shape == (3, 320)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(embed(files[1:2])[0], vectors[1], atol=1e-5)
    assert abs(vectors[0] - vectors[1]).max() > 1e-4
