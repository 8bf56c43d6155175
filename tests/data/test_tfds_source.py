"""A TFDS dataset gives the same batches as the folder that it was made of."""

import dataclasses
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import tiny_tfds

from unified_mm.config import Config
from unified_mm.data.pipeline import evaluation_batches, training_batches
from unified_mm.data.sources import open_source


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A COCO folder, the dataset made of it, and a cache."""
    place = tmp_path_factory.mktemp("made")
    folder = tiny_tfds.write_coco(place / "coco")
    return folder, tiny_tfds.prepare(folder, place / "dataset", place / "cache"), place / "cache"


@pytest.fixture
def copied(made, tmp_path):
    """The dataset, to be damaged."""
    return shutil.copytree(made[1], tmp_path / "dataset")


@pytest.fixture(scope="module")
def modalities():
    return tiny.task().modalities


def both(made, **changes):
    folder, dataset, cache = made
    changes = {"max_bad_share": 0.5, **changes}
    ours = open_source(tiny_tfds.options(folder, cache, **changes))
    return ours, open_source(tiny_tfds.options(dataset, cache, source="tfds", **changes))


def opened(folder, tmp_path, **changes):
    return open_source(tiny_tfds.options(folder, tmp_path / "cache", source="tfds", **changes))


def equal(ours, theirs):
    for a, b in itertools.zip_longest(ours, theirs):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].keys() == b[name].keys()
            for key in a[name]:
                assert a[name][key].dtype == b[name][key].dtype
                np.testing.assert_array_equal(a[name][key], b[name][key])


def trained(source, modalities, workers=0, steps=8):
    records = source.manifest("train").records
    options = {"seed": 3, "batch_size": 8, "start_step": 2, "threads": 2, "workers": workers}
    batches = training_batches(records, modalities, **options)
    found = list(itertools.islice(batches, steps))
    batches.close()
    return found


def evaluated(source, modalities, split="val"):
    return list(evaluation_batches(source.manifest(split).records, modalities, batch_size=3))


@pytest.mark.parametrize("question_share", [0.0, 0.5])
def test_batches_are_those_of_the_folder(made, modalities, question_share):
    ours, theirs = both(made, question_share=question_share)
    equal(trained(ours, modalities), trained(theirs, modalities))
    for split in ("train", "val"):
        equal(evaluated(ours, modalities, split), evaluated(theirs, modalities, split))


@pytest.mark.slow
def test_batches_of_worker_processes_are_those_of_the_folder(made, modalities):
    ours, theirs = both(made, question_share=0.5)
    equal(trained(ours, modalities), trained(theirs, modalities, workers=2))


@pytest.mark.parametrize("question_share", [0.0, 0.5])
def test_examples_questions_and_foils_are_those_of_the_folder(made, question_share):
    for _ in ("read", "from the cache"):
        ours, theirs = both(made, question_share=question_share)
        assert sorted(ours.splits()) == sorted(theirs.splits())
        for split in ours.splits():
            a, b = ours.manifest(split), theirs.manifest(split)
            assert a.fingerprint == b.fingerprint
            for one, other in zip(a.records, b.records, strict=True):
                assert dataclasses.replace(one, parts={}) == dataclasses.replace(other, parts={})
                if one.image is None:
                    assert other.image is None
                    continue
                with open(one.image, "rb") as file:
                    assert file.read() == other.image.read()
                assert one.image.endswith(other.image.name)
            assert ours.questions(split) == theirs.questions(split)
            assert ours.foils(split) == theirs.foils(split)


def test_conversions_are_counted_as_in_the_folder(made):
    ours, theirs = both(made)
    found = [
        {(problem.what, problem.action) for problem in source.manifest("train").problems}
        for source in (ours, theirs)
    ]
    assert found[0] - found[1] == {
        ("Truncated File Read", "left out"),
        ("file of another image id too", "converted"),
    }
    assert found[1] - found[0] == {("foil on an image that is not listed", "left out")}
    assert ("greyscale", "converted") in found[1] and ("PNG named .jpg", "converted") in found[1]


def test_stored_images_pickle_without_open_files(made):
    record = both(made)[1].manifest("train").records[0]
    data = record.image.read()
    other = pickle.loads(pickle.dumps(record))
    assert other == record and other.image.read() == data
    assert len(pickle.dumps(record)) < 1000


def test_a_loaded_model_sees_stored_images_as_files(made):
    from unified_mm.inference.loaded import LoadedModel, one_device_mesh

    model = LoadedModel(tiny.task(), {}, one_device_mesh(), Config({}), 0)
    ours, theirs = (source.manifest("val").records[1].image for source in both(made))
    np.testing.assert_array_equal(model.view(ours), model.view(theirs))
    assert str(theirs).endswith("dataset val[1] (images/val/1.jpg)")


def test_what_is_unchanged_is_read_once(made, monkeypatch, tmp_path):
    from unified_mm.data import tfds_source

    source = opened(made[1], tmp_path, max_bad_share=0.5)
    first = source.manifest("train")
    monkeypatch.setattr(tfds_source.TfdsSource, "_read", None)
    assert opened(made[1], tmp_path, max_bad_share=0.5).manifest("train") == first


# Datasets that TFDS prepared itself.


def foreign(place, features, examples, file_format="array_record"):
    """The folder of a dataset that TFDS prepares of these examples, in its own order."""
    import tensorflow_datasets as tfds

    class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # to look for some, TFDS needs a package that it does not ask for

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(), "validation": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    builder = Foreign(data_dir=os.fspath(place), file_format=file_format)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return place / "foreign" / "1.0.0"


def jpeg(made, number):
    return (made[0] / "images" / "train" / f"{number}.jpg").read_bytes()


def test_a_dataset_of_tfds_own_is_read(made, tmp_path, modalities):
    import tensorflow_datasets as tfds

    f = tfds.features
    folder = foreign(
        tmp_path / "data",
        {
            "image": f.Image(encoding_format="jpeg"),
            "image/filename": f.Text(),
            "image/id": f.Scalar(np.int64),
            "objects": f.Sequence({"area": np.int64, "bbox": f.BBoxFeature()}),
            "captions": f.Sequence({"id": np.int64, "text": f.Text()}),
        },
        [
            {
                "image": jpeg(made, n),
                "image/filename": f"{n}.jpg",
                "image/id": 10 + n,
                "objects": [],
                "captions": [{"id": k, "text": f"  {n} is a cat, {k} "} for k in range(n % 3)],
            }
            for n in range(7)
        ],
    )
    source = opened(folder, tmp_path)
    assert list(source.splits()) == ["train", "validation"] and source.banner is None
    records = source.manifest("train").records
    assert {record.id for record in records} == set(range(10, 17))
    for record in records:
        n = record.id - 10
        assert [text.target for text in record.texts] == [
            f"{n} is a cat, {k}" for k in range(n % 3)
        ]
        assert record.image.name == f"{n}.jpg" and record.image.read() == jpeg(made, n)
    assert evaluated(source, modalities, "validation")[0]["image"]["present"].all()
    with pytest.raises(ValueError, match="no split 'val'; it has train, validation: set"):
        source.manifest("val")


@pytest.mark.parametrize(
    ("kind", "captions", "asked", "message"),
    [
        ("text", "a cat", {}, None),
        ("texts", ["a cat", "a dog"], {}, None),
        ("group", [{"words": "a cat", "n": 1}], {"captions": "said.words"}, None),
        ("group", [{"words": "a cat", "n": 1}], {"captions": "said.n"}, "said holds no text"),
        ("group", [{"words": "a cat", "n": 1}], {}, "said holds no text"),
        ("text", "a cat", {"captions": "said.words"}, "said holds no text"),
        ("text", "a cat", {"captions": "saids"}, "no such feature.*picture: Image.*said: Text"),
        ("text", "a cat", {"captions": ""}, r"captions='': none is called as usual \(captions,"),
        ("text", "a cat", {"image": "said"}, "said is not an image"),
        ("text", "a cat", {"id": "picture"}, "picture is not a whole number"),
        ("text", "a cat", {"name": "pixels"}, "data.tfds.name='pixels': there is no such"),
    ],
)
def test_features_are_named_by_the_config(made, tmp_path, kind, captions, asked, message):
    import tensorflow_datasets as tfds

    f = tfds.features
    kinds = {
        "text": f.Text(),
        "texts": f.Sequence(f.Text()),
        "group": f.Sequence({"words": f.Text(), "n": np.int64}),
    }
    example = {"picture": jpeg(made, 1), "said": captions}
    features = {"picture": f.Image(), "said": kinds[kind]}
    folder = foreign(tmp_path / "data", features, [example])
    names = tiny_tfds.options(folder, tmp_path).tfds.as_dict()
    names |= {"image": "picture", "captions": "said"} | asked
    if message:
        with pytest.raises(ValueError, match=message):
            opened(folder, tmp_path, tfds=names)
        return
    (record,) = opened(folder, tmp_path, tfds=names).manifest("train").records
    assert record.id == 0 and record.image.name == "train[0]"
    said = captions if isinstance(captions, list) else [captions]
    said = [each["words"] if isinstance(each, dict) else each for each in said]
    assert [text.target for text in record.texts] == said


def test_bad_images_inside_are_counted_and_refused(made, tmp_path):
    import tensorflow_datasets as tfds

    f = tfds.features
    images = [jpeg(made, n) for n in range(4)] + [jpeg(made, 4)[:150], b"no picture"]
    examples = [{"image": data, "text": f"cat {n}"} for n, data in enumerate(images)]
    examples[0]["text"] = "  "
    folder = foreign(tmp_path / "data", {"image": f.Image(), "text": f.Text()}, examples)
    with pytest.raises(ValueError, match=r"2 of the 6 images of 'train' in .* raise data.max_bad"):
        opened(folder, tmp_path).manifest("train")
    manifest = opened(folder, tmp_path, max_bad_share=0.4).manifest("train")
    assert len(manifest.records) == 4
    assert sorted(problem.what for problem in manifest.problems) == [
        "Truncated File Read",
        "empty caption",
        "not an image of a known format",
    ]


def test_ids_that_repeat_are_left_out(made, tmp_path):
    import tensorflow_datasets as tfds

    f = tfds.features
    features = {"image": f.Image(), "text": f.Text(), "id": f.Text()}
    examples = [{"image": jpeg(made, n), "text": "cat", "id": f"{n % 2}"} for n in range(4)]
    folder = foreign(tmp_path / "data", features, examples)
    manifest = opened(folder, tmp_path, max_bad_share=0.5).manifest("train")
    assert sorted(record.id for record in manifest.records) == ["0", "1"]
    assert {problem.what for problem in manifest.problems} == {"id of another example too"}


# What is no dataset, and what is damaged.


def test_other_formats_are_refused(copied, tmp_path):
    told = json.loads((copied / "dataset_info.json").read_text())
    (copied / "dataset_info.json").write_text(json.dumps({**told, "fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="holds tfrecord files; read is array_record alone"):
        opened(copied, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset_info.json", None, "has no dataset_info.json and is no TFDS dataset: give"),
        ("features.json", None, "has no features.json"),
        ("dataset_info.json", "{", "dataset_info.json: not JSON at line 1, column 2"),
        ("features.json", "[", "features.json: not JSON"),
        ("dataset_info.json", '{"fileFormat": "array_record", "splits": 3}', "not as TFDS writes"),
        ("features.json", '{"pythonClassName": "nowhere.Feature"}', "not as TFDS writes"),
    ],
)
def test_damaged_descriptions_are_named(copied, tmp_path, name, content, message):
    if content is None:
        (copied / name).unlink()
    else:
        (copied / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        opened(copied, tmp_path)


def test_the_folder_above_a_dataset_says_where_it_is(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"but there is one in .*/dataset$"):
        opened(copied.parent, tmp_path)
    found = open_source(tiny_tfds.options(copied, tmp_path, source="auto"))
    assert found.name == "tfds" and found.splits() == ("train", "val")
    with pytest.raises(ValueError, match="needs data.dir: the folder with dataset_info.json"):
        opened("", tmp_path)


def shard(folder):
    return sorted(folder.glob("*-train.array_record-*"))[1]


def cut(path):
    path.write_bytes(path.read_bytes()[:-9000])


def empty(path):
    path.write_bytes(b"")


def flip_in_first_chunk(path):
    data = bytearray(path.read_bytes())
    data[300] ^= 0xFF
    path.write_bytes(data)


def swap(path):
    shutil.copy(sorted(path.parent.glob("*-val.array_record-*"))[-1], path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "is damaged or cut off, where dataset_info.json says .* copy or prepare it again"),
        (empty, "is damaged or cut off"),
        (flip_in_first_chunk, "is damaged at example 0: .*hash mismatch"),
        (os.remove, "is missing, though dataset_info.json lists it"),
        (swap, "holds . examples, where dataset_info.json says"),
    ],
)
def test_damaged_shards_are_named(copied, tmp_path, damage, message):
    path = shard(copied)
    damage(path)
    source = opened(copied, tmp_path, max_bad_share=0.5)
    source.manifest("val")
    with pytest.raises((ValueError, FileNotFoundError), match=f"{path.name} {message}"):
        source.manifest("train")


def test_a_shard_that_goes_bad_while_it_is_read_is_named(copied, tmp_path, modalities):
    source = opened(copied, tmp_path, max_bad_share=0.5)
    records = source.manifest("train").records
    flip_in_first_chunk(shard(copied))
    with pytest.raises(ValueError, match=f"{shard(copied).name} is damaged at example"):
        list(evaluation_batches(records, modalities, batch_size=4))


# The network, and what is imported.


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A bucket gs://bucket whose files lie in a folder of this machine."""
    import fsspec
    from etils.epath import backend
    from fsspec.implementations.dirfs import DirFileSystem

    class Bucket(DirFileSystem):
        protocol = "gs"

        def __init__(self, **_):
            files = fsspec.filesystem("file")
            super().__init__(path=os.fspath(tmp_path / "store"), fs=files)

        @classmethod
        def _strip_protocol(cls, path):
            return os.fspath(path).removeprefix("gs://").rstrip("/")

    known = {**fsspec.registry}
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    (tmp_path / "store").mkdir()
    yield tmp_path / "store" / "bucket"
    backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.register_implementation("gcs", known.get("gcs", "gcsfs.GCSFileSystem"), clobber=True)


def test_a_dataset_of_the_network_is_copied_into_the_cache(made, modalities, store, tmp_path):
    shutil.copytree(made[1], store / "data")
    theirs = opened("gs://bucket/data", tmp_path, max_bad_share=0.5)
    equal(trained(both(made)[0], modalities, steps=2), trained(theirs, modalities, steps=2))
    assert theirs.foils("train") and theirs.questions("train")
    copies = sorted(path.name for path in (tmp_path / "cache").rglob("*.array_record-*"))
    assert copies == [path.name for path in sorted(store.rglob("*train.array_record-*"))]


def test_a_network_that_fails_is_named(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="gs://bucket/none has no dataset_info.json"):
        opened("gs://bucket/none", tmp_path)
    with pytest.raises(ValueError, match="data.dir=xy://bucket/none"):
        opened("xy://bucket/none", tmp_path)


def test_neither_tfds_nor_tensorflow_is_imported_where_it_need_not_be(made, tmp_path):
    """A tensorflow that breaks whoever imports it lies on the path."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('imported')")
    folder, dataset, cache = made
    script = f"""
import sys
sys.path[:0] = {[os.fspath(tmp_path), *sys.path]!r}
import unified_mm, unified_mm.main, tiny_tfds
from pathlib import Path
from unified_mm.data.sources import open_source
open_source(tiny_tfds.options({str(folder)!r}, {str(cache)!r}, max_bad_share=0.5)).manifest("train")
assert "tensorflow_datasets" not in sys.modules, "tfds is imported"
from unified_mm.data import tfds_writer
tiny_tfds.prepare(Path({str(folder)!r}), Path({str(tmp_path / "again")!r}), {str(cache)!r})
changes = {{"max_bad_share": 0.5, "source": "tfds"}}
data = tiny_tfds.options({str(tmp_path / "again")!r}, {str(cache)!r}, **changes)
print(len(open_source(data).manifest("train").records[0].image.read()))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[-1]) > 100
