"""Several sources in one run: exact shares, epochs of each, and the same on every way there."""

from collections import Counter

import numpy as np
import pytest
import tiny

from unified_mm.cli.recipes import read_recipe, resolve
from unified_mm.config import Config
from unified_mm.data.mixture import PERIOD, MixedSource, Mixture, mixture_of
from unified_mm.data.pipeline import training_batches
from unified_mm.data.records import Record, Text
from unified_mm.data.sources import open_source

SHARES = {"a": 0.617, "b": 0.25, "c": 0.133}
SIZES = {"a": 300, "b": 40, "c": 7}


class Number:
    """Prepares an example's id, and a number that its generator draws."""

    def prepare(self, record, rng):
        return {"id": np.array(record.id), "drawn": np.array(rng.integers(1000))}

    def absent(self):
        return {"id": np.array("?"), "drawn": np.array(0)}


def records():
    return [
        Record(f"{name}/{i}", {"n": i}, (Text("", f"{name}{i % 3}"),), False)
        for name, size in SIZES.items()
        for i in range(size)
    ]


def mixed(balance="", alpha=1.0, **shares):
    members = {name: {"share": share, "balance": balance} for name, share in shares.items()}
    config = tiny.config_dict(data__source="mixture", data__mixture_alpha=alpha)
    config.data.mixture = members
    return mixture_of(Config(config.to_dict()).data, records())


def drawn(mixture, count, start=0):
    return [mixture[mixture.place_of(i, 5)].id for i in range(start, start + count)]


def test_any_thousand_samples_have_the_shares_to_one():
    ids = drawn(mixed(**SHARES), 2300)
    for start in range(0, 1300, 37):
        found = Counter(id[0] for id in ids[start : start + PERIOD])
        assert all(abs(found[name] - PERIOD * share) <= 1 for name, share in SHARES.items())
    # Batches have them too, as far as so few can.
    assert all(15 <= sum(id[0] == "a" for id in ids[i : i + 30]) <= 22 for i in range(0, 900, 30))


def test_nothing_comes_again_before_all_of_its_source_have_come():
    mixture = mixed(**SHARES)
    ids = [id for id in drawn(mixture, 1500) if id.startswith("b/")]
    first, second = ids[:40], ids[40:80]
    assert len(set(first)) == len(set(second)) == 40 and first != second
    assert mixture.epochs(2000) == pytest.approx({"a": 1234 / 300, "b": 500 / 40, "c": 266 / 7})


def test_shares_by_size_and_values_that_are_balanced():
    zeros = dict.fromkeys(SHARES, 0.0)
    by_size = Counter(id[0] for id in drawn(mixed(**zeros), PERIOD))
    assert abs(by_size["a"] - 300 / 347 * PERIOD) <= 1
    alike = Counter(id[0] for id in drawn(mixed(alpha=0.0, **zeros), PERIOD))
    assert max(alike.values()) - min(alike.values()) <= 1
    balanced = mixed("text", **SHARES)
    of_c = [balanced[balanced.place_of(i, 5)] for i in range(PERIOD)]
    texts = Counter(record.texts[0].target for record in of_c if record.id.startswith("c/"))
    assert max(texts.values()) - min(texts.values()) <= 1  # three, two and two examples


@pytest.mark.parametrize(("start", "threads", "rows"), ((0, 3, None), (2, 1, None), (0, 1, [1, 3])))
def test_the_same_arrays_on_resume_by_threads_and_processes(start, threads, rows):
    def batches(**how):
        found = training_batches(mixed(**SHARES), {"n": Number()}, seed=5, batch_size=4, **how)
        taken = [next(found)["n"] for _ in range(4 - how.get("start_step", 0))]
        found.close()
        return taken

    whole = batches(threads=1)[start:]
    part = batches(start_step=start, threads=threads, rows=rows)
    for one, other in zip(whole, part, strict=True):
        for key in one:
            np.testing.assert_array_equal(
                one[key][slice(None) if rows is None else rows], other[key]
            )


@pytest.mark.parametrize(
    ("shares", "named"),
    (
        ({"a": 0.5, "b": 0.5, "c": 0.0}, "data.mixture.c has no share, and a has"),
        ({"a": 1.0, "b": 1.0, "c": 1e-4}, "data.mixture.c: its share is less than one in 1,000"),
        ({"a": 0.5, "b": 0.2, "c": 0.2, "d": 0.1}, "data.mixture.d has no examples"),
        ({}, "must name its sources"),
    ),
)
def test_shares_that_cannot_be_are_refused(shares, named):
    with pytest.raises(ValueError, match=named):
        mixed(**shares)


def test_a_field_that_no_example_has_is_not_balanced():
    mixed("n", a=0.5, b=0.3, c=0.2)
    with pytest.raises(ValueError, match="data.mixture.a.balance='lable': none of its examples"):
        mixed("lable", a=0.5, b=0.3, c=0.2)


def test_sources_are_opened_by_name_and_each_is_scored_apart(tmp_path):
    sizes = {"a": 2, "b": 3}
    folders = {name: tiny.write_coco(tmp_path / name, 4, val) for name, val in sizes.items()}
    config = tiny.config_dict(data__source="mixture", data__cache_dir=str(tmp_path / "cache"))
    config.data.mixture = {name: {"dir": str(folder)} for name, folder in folders.items()}
    data = Config(config.to_dict()).data
    source = open_source(data)
    assert isinstance(source, MixedSource)
    assert all(
        f"data: {folder} is read as MS-COCO" in source.described for folder in folders.values()
    )
    assert source.splits() == ["train", "val", "val_a", "val_b"]
    found = {split: source.manifest(split) for split in source.splits()}
    assert {split: len(each.records) for split, each in found.items()} == {
        "train": 8, "val": 5, "val_a": 2, "val_b": 3,
    }  # fmt: skip
    assert len({each.fingerprint for each in found.values()}) == 4
    assert isinstance(mixture_of(data, found["train"].records), Mixture)
    with pytest.raises(ValueError, match="no source of data.mixture has a split 'test'"):
        source.manifest("test")
    # What is trained on is no split to score on, whatever it is called.
    config.data.train_split = "val"
    other = open_source(Config(config.to_dict()).data)
    assert other.splits() == ["train", "val", "train_a", "train_b"]


def test_the_folders_of_sources_are_named_whole(tmp_path, monkeypatch):
    """A run may be scored from another directory; what lies in a bucket has a name of its own."""
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe("coco:tiny", ())
    recipe.config.data.mixture = {
        "near": {"dir": "here", "share": 0.5},
        "far": {"dir": "gs://there/it", "share": 0.5},
        "drawn": {"source": "world", "share": 0.5},
    }
    recipe.config.data.manifest = "cleaned/manifest.json"
    resolved = resolve(recipe, lambda line: None).data
    assert resolved.manifest == str(tmp_path / "cleaned" / "manifest.json")
    found = resolved.mixture
    assert found.near.dir == str(tmp_path / "here") and found.far.dir == "gs://there/it"
    assert "dir" not in found.drawn
