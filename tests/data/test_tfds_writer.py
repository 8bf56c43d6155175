"""Datasets are written whole or not at all, and gone on with after any kill."""

import dataclasses
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_tfds
from PIL import Image

from unified_mm.cli.messages import disk_is_full
from unified_mm.data import tfds_writer
from unified_mm.data.sources import open_source
from unified_mm.data.tfds_examples import Options
from unified_mm.data.tfds_writer import progress


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tfds.write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(folder, cache, tmp_path_factory):
    return tiny_tfds.prepare(folder, tmp_path_factory.mktemp("made") / "dataset", cache)


def files(folder):
    return {
        os.fspath(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*.array_record-*")}


def work(out):
    return out.with_name(f".{out.name}.preparing")


def test_tfds_reads_it_as_its_own(whole):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(whole)
    assert builder.info.features["image/id"].np_dtype == np.int64
    assert {name: len(split.shard_lengths) > 1 for name, split in builder.info.splits.items()} == {
        "train": True,
        "val": True,
    }
    skip = {"image": tfds.decode.SkipDecoding()}
    example = builder.as_data_source("val", decoders=skip)[2]
    assert example["captions"]["text"] == [b"a blue square of size 2", b"blue, size 2"]
    assert example["image/filename"] == b"images/val/2.jpg" and example["mirrorable"]
    assert not list(whole.glob(".*")) and not work(whole).exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 3])
def test_what_was_stopped_goes_on(folder, cache, whole, tmp_path, monkeypatch, after):
    out, written = tmp_path / "dataset", []
    write_shard = tfds_writer._write_shard

    def stopped(path, examples, count):
        def cut():
            for number, example in enumerate(examples):
                if len(written) == after and number == 1:
                    raise Killed
                yield example

        write_shard(path, cut(), count)
        written.append(path.name)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tfds_writer, "_write_shard", stopped)
        tiny_tfds.prepare(folder, out, cache)
    assert not out.exists()
    before = times(work(out))
    assert sorted(before) == sorted(written) and len(before) == after
    assert f"{after} of {len(times(whole))} shards are whole" in progress(out)
    tiny_tfds.prepare(folder, out, cache)
    assert {name: times(out)[name] for name in before} == before  # not written again
    assert files(out) == files(whole)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 4, 7])
def test_a_killed_process_goes_on(folder, cache, whole, tmp_path, shards):
    out = tmp_path / "dataset"
    script = f"""
import sys, time
sys.path[:0] = {sys.path!r}
import tiny_tfds
from pathlib import Path
from unified_mm.data import tfds_writer
made = tfds_writer.to_example
def slowly(*arguments):
    time.sleep(0.05)
    return made(*arguments)
tfds_writer.to_example = slowly
tiny_tfds.prepare(Path({str(folder)!r}), Path({str(out)!r}), {str(cache)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    while len(times(work(out))) < shards:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = times(work(out))
    assert not out.exists()
    tiny_tfds.prepare(folder, out, cache)
    assert {name: times(out)[name] for name in before} == before
    assert files(out) == files(whole)


def test_what_is_there_is_left_alone(folder, cache, whole, tmp_path):
    before = times(whole)
    tiny_tfds.prepare(folder, whole, cache)  # the same: nothing to do
    assert times(whole) == before
    with pytest.raises(ValueError, match=r"exists and is not overwritten.*\(its encoding, splits"):
        tiny_tfds.prepare(folder, whole, cache, Options(resize=8))
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine exists and is not overwritten: name a new folder"):
        tiny_tfds.prepare(folder, tmp_path / "mine", cache)


def test_a_beginning_of_other_data_is_refused(folder, cache, tmp_path):
    out = tmp_path / "dataset"
    work(out).mkdir()
    (work(out) / "prepared.json").write_text(json.dumps({"splits": {}, "encoding": None}))
    with pytest.raises(ValueError, match="was begun with other data or options: delete it"):
        tiny_tfds.prepare(folder, out, cache)


def test_two_at_work_on_one_dataset_are_refused(folder, cache, tmp_path):
    out = tmp_path / "dataset"
    work(out).mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, time; f = open({str(work(out) / '.lock')!r}, 'a+'); "
            "fcntl.lockf(f, fcntl.LOCK_EX); f.write('4711'); f.flush(); print('held', flush=True); "
            "time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdout.readline()
        with pytest.raises(ValueError, match="process 4711 is at work"):
            tiny_tfds.prepare(folder, out, cache)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with open(work(out) / ".lock", "a+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_full_disk_is_told_and_gone_on_from(folder, cache, whole, tmp_path):
    """The kernel's own full device takes the place of the second shard."""
    out = tmp_path / "dataset"
    work(out).mkdir()
    second = sorted(times(whole))[1]
    (work(out) / f".{second}.tmp").symlink_to("/dev/full")
    with pytest.raises(
        ValueError, match=f"{second}.* cannot be written: .*No space left"
    ) as raised:
        tiny_tfds.prepare(folder, out, cache)
    assert disk_is_full(raised.value)
    assert f"1 of {len(times(whole))} shards are whole in {work(out)}" in progress(out)
    (work(out) / f".{second}.tmp").unlink()
    tiny_tfds.prepare(folder, out, cache)
    assert files(out) == files(whole)


def test_a_folder_that_cannot_be_written_is_named(folder, cache, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out=.*file/dataset: "):
        tiny_tfds.prepare(folder, tmp_path / "file" / "dataset", cache)


def test_resized_images_have_their_shorter_side(folder, cache, tmp_path):
    out = tiny_tfds.prepare(folder, tmp_path / "small", cache, Options(resize=10, quality=90))
    options = tiny_tfds.options(out, cache, source="tfds", max_bad_share=0.5)
    records = {record.id: record for record in open_source(options).manifest("train").records}
    sides = {
        key: Image.open(io.BytesIO(r.image.read())).size for key, r in records.items() if r.image
    }
    assert sides[0] == (12, 10) and sides[100] == (15, 10) and sides[101] == (10, 15)
    assert records[101].image.name == "images/train/png.jpg" and records[103].image is None
    unchanged = tiny_tfds.prepare(folder, tmp_path / "large", cache, Options(resize=20))
    options = tiny_tfds.options(unchanged, cache, source="tfds", max_bad_share=0.5)
    record = open_source(options).manifest("train").records[0]
    assert record.image.read() == (folder / "images" / "train" / "0.jpg").read_bytes()


def test_a_dataset_can_be_written_of_a_dataset(cache, whole, folder, tmp_path):
    out = tiny_tfds.prepare(whole, tmp_path / "again", cache, source="tfds")
    first, again = (
        open_source(tiny_tfds.options(each, cache, source="tfds", max_bad_share=0.5))
        for each in (whole, out)
    )
    assert again.manifest("train").fingerprint == first.manifest("train").fingerprint
    assert again.questions("val") == first.questions("val")


def write_captions(folder, images, name="train"):
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / "a.jpg")
    content = {
        "info": {"directional": True},
        "images": [{"id": key, "file_name": file} for key, file in images.items()],
        "annotations": [{"image_id": key, "caption": "a cat"} for key in images],
    }
    (folder / "annotations" / f"captions_{name}.json").write_text(json.dumps(content))
    return folder


def test_ids_may_be_strings_but_not_both(tmp_path, cache):
    folder = write_captions(tmp_path / "texts", {"x": "a.jpg", "ÿ": None})
    out = tiny_tfds.prepare(folder, tmp_path / "out", cache)
    options = tiny_tfds.options(out, cache, source="tfds")
    records = open_source(options).manifest("train").records
    assert [(record.id, record.mirrorable) for record in records] == [("x", False), ("ÿ", False)]
    for number, ids in enumerate(({"x": "a.jpg", 1: None}, {2**63: "a.jpg"})):
        mixed = write_captions(tmp_path / f"mixed{number}", ids)
        with pytest.raises(ValueError, match="write them alike"):
            tiny_tfds.prepare(mixed, tmp_path / f"none{number}", cache)


def test_splits_that_tfds_cannot_name_are_refused(tmp_path, cache):
    folder = write_captions(tmp_path / "data", {1: "a.jpg"}, name="train clean")
    with pytest.raises(ValueError, match="the split 'train clean' of .* rename its files"):
        tiny_tfds.prepare(folder, tmp_path / "out", cache)


def test_the_world_stays_known_as_such(tmp_path, cache):
    world = {"train": 6, "val": 3, "test_composition": 2, "seed": 0}
    out = tmp_path / "world"
    source = open_source(tiny_tfds.options("", cache, source="world", world=world, image_size=32))
    tfds_writer.write_dataset(source, out, Options(), lambda _: None)
    theirs = open_source(tiny_tfds.options(out, cache, source="tfds"))
    assert "EMBEDDED WORLD" in theirs.banner
    for split in ("train", "val", "test_composition"):
        assert source.manifest(split).fingerprint == theirs.manifest(split).fingerprint
        assert source.foils(split) == theirs.foils(split)
        assert source.questions(split) == theirs.questions(split)
        a, b = source.manifest(split).records, theirs.manifest(split).records
        assert [dataclasses.replace(each, parts={}) for each in a] == [
            dataclasses.replace(each, parts={}) for each in b
        ]


def test_files_of_vqa_keep_their_names_and_their_leave_to_serve_other_years(
    folder, cache, tmp_path
):
    theirs = tmp_path / "coco"
    shutil.copytree(folder, theirs)
    for ours, name in (
        ("questions_train", "v2_OpenEnded_mscoco_train2014_questions"),
        ("answers_train", "v2_mscoco_train2014_annotations"),
    ):
        (theirs / "annotations" / f"{ours}.json").rename(theirs / f"{name}.json")
    out = tiny_tfds.prepare(theirs, tmp_path / "dataset", cache)
    first, again = (
        open_source(tiny_tfds.options(each, cache, max_bad_share=0.5, **source))
        for each, source in ((theirs, {}), (out, {"source": "tfds"}))
    )
    assert again.questions("train") == first.questions("train") != ()
    assert (out / "annotations" / "v2_mscoco_train2014_annotations.json").is_file()
