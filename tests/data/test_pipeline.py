"""The global batch is a function of seed and step alone, whatever reads it."""

import itertools
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unified_mm.data import images
from unified_mm.data.pipeline import Unreadable, evaluation_batches, training_batches
from unified_mm.data.records import Record, Text


class Noise:
    """Shows which record and which random draws a row got."""

    def prepare(self, record, rng):
        draw = 0 if rng is None else rng.integers(2**62, size=3)
        return {
            "id": np.array(record.id),
            "draw": np.broadcast_to(draw, 3).astype(np.int64),
            "present": np.array(record.image is not None),
        }

    def absent(self):
        zeros = np.zeros(3, np.int64)
        return {"id": np.array(-1), "draw": zeros, "present": np.array(False)}


class Pixels:
    def prepare(self, record, rng):
        return {"pixels": images.decode(record.image), "present": np.array(True)}

    def absent(self):
        return {"pixels": np.zeros((2, 2, 3), np.uint8), "present": np.array(False)}


def records(count):
    return [
        Record(i, {"image": f"{i}.jpg"} if i % 3 else {}, (Text("", "x"),), True)
        for i in range(count)
    ]


def first(count, iterator):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def train(steps, n=10, names=("a",), **options):
    options = {"seed": 5, "batch_size": 4, **options}
    return first(steps, training_batches(records(n), dict.fromkeys(names, Noise()), **options))


def equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].keys() == b[name].keys()
            for key in a[name]:
                assert a[name][key].dtype == b[name][key].dtype
                np.testing.assert_array_equal(a[name][key], b[name][key])


def ids(batches, name="a"):
    return np.concatenate([batch[name]["id"] for batch in batches]).tolist()


def test_rows_are_the_ones_that_the_definition_names():
    # The definition written out: Philox keyed by (seed, stream), counter's highest word.
    def draws(stream, number):
        key = np.array([5, zlib.crc32(stream)], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))

    order = np.concatenate([draws(b"epoch order", epoch).permutation(10) for epoch in range(2)])
    batches = train(5)
    assert ids(batches) == order.tolist()
    got = np.concatenate([batch["a"]["draw"] for batch in batches])
    want = np.stack([draws(b"a", i).integers(2**62, size=3) for i in range(20)])
    np.testing.assert_array_equal(got, want)


def test_batches_have_a_row_for_each_example_and_keep_presence():
    batch = train(1, names=("a", "b"))[0]
    assert set(batch) == {"a", "b"}
    assert batch["a"]["id"].shape == (4,) and batch["a"]["draw"].shape == (4, 3)
    np.testing.assert_array_equal(batch["a"]["present"], batch["a"]["id"] % 3 != 0)


def test_every_epoch_shows_every_record_once_in_its_own_order():
    shown = np.array(ids(train(15, n=12))).reshape(5, 12)
    assert (np.sort(shown) == np.arange(12)).all()
    assert len({tuple(epoch) for epoch in shown}) == 5


def test_seed_changes_order_and_draws():
    assert ids(train(3)) != ids(train(3, seed=6))


def test_a_record_is_drawn_anew_in_every_epoch():
    draws = [batch["a"]["draw"][0, 0] for batch in train(6, n=1, batch_size=1)]
    assert len(set(draws)) == 6


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_nothing(threads):
    equal(train(8, threads=threads), train(8, threads=2, prefetch=1))


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9), st.integers(0, 7), st.sampled_from([1, 2, 3]), st.integers(1, 3))
def test_processes_and_restarts_read_the_same_global_batches(n, start, processes, rows):
    size = processes * rows
    whole = train(start + 3, n=n, batch_size=size)[start:]
    parts = [
        train(3, n=n, batch_size=size, start_step=start, rows=range(p * rows, (p + 1) * rows))
        for p in range(processes)
    ]
    joined = [
        {"a": {k: np.concatenate([s["a"][k] for s in step]) for k in step[0]["a"]}}
        for step in zip(*parts, strict=True)
    ]
    equal(joined, whole)


def test_a_further_modality_changes_no_other():
    alone, both = train(4), train(4, names=("a", "b"))
    equal([{"a": batch["a"]} for batch in both], alone)
    assert (both[0]["a"]["draw"] != both[0]["b"]["draw"]).all()


def test_data_smaller_than_a_batch_wraps_epochs():
    (batch,) = train(1, n=3, batch_size=9)
    assert np.sort(batch["a"]["id"].reshape(3, 3)).tolist() == [[0, 1, 2]] * 3


@pytest.mark.slow
def test_workers_change_nothing():
    for options in ({}, {"start_step": 3, "rows": (1, 3)}):
        equal(train(7, workers=2, **options), train(7, **options))


def test_evaluation_reads_everything_once_in_order_and_fills_up():
    for threads in (1, 4):
        batches = list(
            evaluation_batches(records(10), {"a": Noise()}, batch_size=4, threads=threads)
        )
        assert ids(batches) == [*range(10), -1, -1]
        assert not batches[-1]["a"]["present"][2:].any()
        assert (np.concatenate([b["a"]["draw"] for b in batches]) == 0).all()


def test_evaluation_is_shared_by_processes():
    whole = list(evaluation_batches(records(9), {"a": Noise()}, batch_size=4))
    for p in range(2):
        options = {"batch_size": 4, "rows": (2 * p, 2 * p + 1)}
        part = list(evaluation_batches(records(9), {"a": Noise()}, **options))
        rows = [{"a": {k: v[2 * p : 2 * p + 2] for k, v in b["a"].items()}} for b in whole]
        equal(part, rows)


def test_a_file_that_vanished_is_named(tmp_path):
    record = Record(1, {"image": str(tmp_path / "gone.jpg")}, (), True)
    batches = training_batches([record], {"image": Pixels()}, seed=0, batch_size=2)
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        next(batches)
    batches.close()


def test_a_file_that_went_bad_is_named(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    record = Record(1, {"image": str(tmp_path / "bad.jpg")}, (), True)
    batches = evaluation_batches([record], {"image": Pixels()}, batch_size=2)
    with pytest.raises(ValueError, match=r"bad\.jpg cannot be decoded"):
        next(batches)
    batches.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "a batch of 0 has no rows"),
        ({"rows": ()}, "a batch of 4 has no rows"),
        ({"rows": (3, 4)}, r"a batch of 4 has no rows \[3, 4\]"),
        ({"seed": -1}, "seed -1 is not in"),
        ({"n": 0}, "no records"),
        ({"names": ()}, "no modalities"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train(1, **options)


class Small(Pixels):
    def absent(self):
        return {"pixels": np.zeros((4, 4, 3), np.uint8), "present": np.array(False)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_part_met_later_that_cannot_be_read_is_absent_and_named(tmp_path, workers):
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(path)
    paths[2].write_bytes(b"no picture")
    paths[4].unlink()
    records = [Record(n, {"image": str(path)}, (), True) for n, path in enumerate(paths)]
    unreadable = Unreadable(str(tmp_path / "unreadable.txt"))
    assert unreadable.lines() == []
    batches = training_batches(
        records, {"image": Small()}, seed=0, batch_size=6, workers=workers, unreadable=unreadable
    )
    batch = next(batches)
    batches.close()
    assert batch["image"]["present"].sum() == 4
    named = {line.partition("\t")[2] for line in unreadable.lines()}
    assert any("2.png cannot be decoded" in line for line in named)
    assert any("4.png" in line and "No such file" in line for line in named)


def test_a_batch_tells_which_record_each_of_its_rows_is_where_that_is_asked_for():
    plain, told = (train(6, n=10, names=("a", "b"), numbered=asked) for asked in (False, True))
    for batch in told:
        assert batch["a"]["record"].dtype == np.int32
        for name in batch:
            np.testing.assert_array_equal(batch[name].pop("record"), batch[name]["id"])
    equal(plain, told)


HOLDING = """
import sys
import tiny
from unified_mm.data.pipeline import training_batches
from unified_mm.data.records import Record, Text

def main():
    global held
    records = [Record(i, {}, (Text("", "a red square"),), False) for i in range(8)]
    modalities = {"text": tiny.task().modalities["text"]}
    batches = training_batches(records, modalities, seed=0, batch_size=4, workers=1)
    held = [next(batches) for _ in range(2)]
    batches.close()

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_what_workers_shared_is_not_left_where_a_batch_is_held_to_the_end(tmp_path):
    """As by a run that is stopped and saved."""
    (tmp_path / "holding.py").write_text(HOLDING)
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "holding.py")],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0 and "leaked" not in ended.stderr, ended.stderr
