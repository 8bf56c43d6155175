"""A dataset of sounds, shapes and clips gives what the folder gives that it was made of."""

import itertools
import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
import tiny_tfds
from PIL import Image

from unified_mm.config import Config
from unified_mm.data.manifest import summary
from unified_mm.data.pipeline import Unreadable, evaluation_batches, training_batches
from unified_mm.data.records import Record, Stored
from unified_mm.data.sources import ListedFolder, open_source
from unified_mm.data.tfds_examples import Options
from unified_mm.evaluation.results import file_name
from unified_mm.modalities.modality import build_modalities
from unified_mm.task import Resources

soundfile = pytest.importorskip("soundfile")

NAMED = {"image": "", "caption": "", "label": "", "points": ""}
NAMED |= {"audio": "speech,sound", "video": "scene,view"}  # what the user calls them
SOUND = {"type": "audio", "seconds": 0.2, "mels": 8, "patch": (5, 4), "std": 0.5, "gain": 3.0}
CLIP = {"type": "video", "frames": 4, "patch": 8}
RESOURCES = Resources(Config(tiny.config_dict().to_dict()).data, tiny.tokenizer())
CLOUD = {"type": "points", "points": 24, "groups": 6, "group": 4, "hidden": 8, "unit": 2.0}


def write_sound(path, seconds, rate=16_000, channels=1):
    """A sound that ends in silence: of bytes that end in zeros."""
    wave = np.random.default_rng(len(path.name)).normal(size=(int(seconds * rate), channels)) / 9
    wave[-rate // 20 :] = 0
    soundfile.write(path, wave, rate, subtype="PCM_16")


def write_rows(folder, count):
    """Pictures, two kinds of sounds, clouds or meshes, and two kinds of clips, any of them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for n in range(count):
        row = {
            "id": f"n{n}",
            "text": f"thing {n} beside it",
            "label": "dog;cat" if n % 2 else "cat",
        }
        if n % 2:
            Image.new("RGB", (20, 24), (9 * n, 50, 90)).save(folder / f"{n}.jpg")
            row["image"] = f"{n}.jpg"
        if n % 3:
            write_sound(folder / f"{n}.wav", 0.3 + 0.1 * n)
            row["speech"] = f"{n}.wav"
        if n % 4 != 2:
            write_sound(folder / f"{n}.flac", 0.1, 8000, 2)
            row["sound"] = f"{n}.flac"
        if n % 5:
            np.save(folder / f"{n}.npy", np.append(rng.normal(size=(30, 3)), np.zeros((1, 3)), 0))
            row["points"] = f"{n}.npy"
        if n % 3 != 1:
            frames = rng.integers(0, 255, (6, 20, 24, 3), np.uint8)
            np.savez(folder / f"{n}.npz", frames=frames, fps=10)
            row["scene"] = f"{n}.npz"
        if n == 5:
            first, *rest = (Image.new("RGB", (20, 20), (40 * k, 0, 0)) for k in range(4))
            first.save(folder / "5.gif", save_all=True, append_images=rest)
            row["view"] = "5.gif"
        rows.append(row)
    write_list(folder, rows)
    return folder


def write_list(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def break_files(folder):
    """Two rows that are left out, and one that is none of them."""
    content = (folder / "1.flac").read_bytes()
    (folder / "1.flac").write_bytes(content[: len(content) // 2])
    (folder / "6.npy").write_bytes(b"no shape")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder, the dataset made of it, and a cache."""
    place = tmp_path_factory.mktemp("made")
    folder = write_rows(place / "data" / "train", 12).parent
    break_files(folder / "train")
    write_rows(folder / "val", 5)
    out = tiny_tfds.prepare(
        folder, place / "dataset", place / "cache", Options(shard_bytes=20_000), fields=NAMED
    )
    return folder, out, place / "cache"


def opened(made):
    folder, dataset, cache = made
    ours = open_source(tiny_tfds.options(folder, cache, max_bad_share=0.5, fields=NAMED))
    return ours, open_source(tiny_tfds.options(dataset, cache, max_bad_share=0.5, source="tfds"))


@pytest.fixture(scope="module")
def modalities():
    config = tiny.config_dict()
    named = {"speech": SOUND, "sound": {**SOUND, "roll": True}}
    named |= {"points": CLOUD, "scene": CLIP, "view": CLIP}
    return build_modalities({**config.model.modalities.to_dict(), **named}, RESOURCES)


def equal(ours, theirs):
    for one, other in itertools.zip_longest(ours, theirs):
        assert one.keys() == other.keys()
        for name, arrays in one.items():
            assert arrays.keys() == other[name].keys()
            for key, array in arrays.items():
                assert array.dtype == other[name][key].dtype
                np.testing.assert_array_equal(array, other[name][key])


def test_records_and_fingerprints_are_those_of_the_folder(made):
    ours, theirs = opened(made)
    assert isinstance(ours, ListedFolder) and theirs.name == "tfds"
    for split, count in (("train", 10), ("val", 5)):
        a, b = ours.manifest(split), theirs.manifest(split)
        assert a.fingerprint == b.fingerprint and len(a.records) == len(b.records) == count
        for one, other in zip(a.records, b.records, strict=True):
            assert replace(one, parts={}) == replace(other, parts={}) and one.labels
            assert list(one.parts) == list(other.parts)
            for name, part in one.parts.items():
                with open(part, "rb") as file:
                    assert file.read() == other.parts[name].read()
                assert str(other.parts[name]).endswith(f"({split}/{part.rpartition('/')[2]})")
    found = {name for each in theirs.manifest("train").records for name in each.parts}
    assert found == {"image", "speech", "sound", "points", "scene", "view"}
    told = summary(theirs.manifest("train"))
    assert "7 speechs" in told and "resampled from 8,000 Hz" in told and "left out" not in told


def test_splits_are_called_as_librispeech_calls_them(tmp_path):
    folder, cache = tmp_path / "data", tmp_path / "cache"
    for split, name in (("train-clean-100", "1-2-0000"), ("dev-clean", "3-4-0000")):
        (folder / split).mkdir(parents=True)
        write_sound(folder / split / f"{name}.flac", 0.1)
        (folder / split / "1-2.trans.txt").write_text(f"{name} {split.upper()}\n")
    out = tiny_tfds.prepare(folder, tmp_path / "dataset", cache)
    found = open_source(tiny_tfds.options(out, cache, source="tfds"))
    assert set(found.splits()) == {"train", "train-clean-100", "val", "dev-clean"}
    for split in ("train", "train-clean-100"):
        (record,) = found.manifest(split).records
        assert record.texts[0].target == "TRAIN-CLEAN-100"
        sound = (folder / "train-clean-100" / "1-2-0000.flac").read_bytes()
        assert record.parts["audio"].read() == sound


def test_what_tells_no_split_is_refused_by_its_name(tmp_path):
    """TFDS would read all splits under it."""
    folder = tmp_path / "data"
    for place in ("train", "val", "more"):
        (folder / place).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / place / "a.jpg")
        (folder / place / "a.txt").write_text(place)
    with pytest.raises(ValueError, match="tell no split, and TFDS calls all splits together 'all'"):
        tiny_tfds.prepare(folder, tmp_path / "dataset", tmp_path / "cache")


def test_batches_by_seed_and_step_are_those_of_the_folder(made, modalities):
    def trained(source, start, steps):
        records = source.manifest("train").records
        options = {"seed": 3, "batch_size": 4, "start_step": start}
        batches = training_batches(records, modalities, **options)
        found = list(itertools.islice(batches, steps))
        batches.close()
        return found

    ours, theirs = opened(made)
    whole = trained(ours, 0, 6)
    equal(whole, trained(theirs, 0, 6))
    equal(whole[4:], trained(theirs, 4, 2))
    assert len({float(x) for each in whole for x in each["speech"]["gain"]}) > 8
    for name, modality in modalities.items():
        assert {bool(x) for each in whole for x in each[name]["present"]} >= {True}, modality
    for split in ("train", "val"):
        equal(
            *(
                evaluation_batches(each.manifest(split).records, modalities, batch_size=3)
                for each in (ours, theirs)
            )
        )


def test_long_sounds_are_heard_in_windows_and_measured(made, modalities):
    speech = replace(modalities["speech"], std=0.0, mean=0.0)
    found = [
        [each for each in source.manifest("train").records if "speech" in each.parts]
        for source in opened(made)
    ]
    assert speech.measure(found[0]) == speech.measure(found[1])
    for one, other in zip(*found, strict=True):
        windows = [speech.windows(each.parts["speech"]) for each in (one, other)]
        assert len(windows[0]) == len(windows[1]) > 1
        for a, b in zip(*windows, strict=True):
            assert a["start"] == b["start"]
            rows = [speech.prepare(Record(0, {"speech": p}, (), True), None) for p in (a, b)]
            np.testing.assert_array_equal(rows[0]["samples"], rows[1]["samples"])
    whole = replace(speech, longer="leave_out")
    part = found[1][-1].parts["speech"]
    assert "longer than model.modalities.speech.seconds=0.2" in whole.fault(part)
    assert whole.steps_of(part) == whole.steps_of(found[0][-1].parts["speech"])


def test_what_is_stored_pickles_and_is_named(made):
    _, theirs = opened(made)
    record = next(r for r in theirs.manifest("val").records if not r.image)
    part = record.parts["sound"]
    assert isinstance(part, Stored) and pickle.loads(pickle.dumps(record)) == record
    assert pickle.loads(pickle.dumps(part)).read() == part.read()
    assert file_name(record, theirs.folder) == "val/0.flac"
    again = opened(made)[1].manifest("val")
    assert again == theirs.manifest("val")  # of the cache


def test_a_dataset_is_made_of_a_dataset(made, tmp_path):
    _, dataset, cache = made
    out = tiny_tfds.prepare(dataset, tmp_path / "again", cache, source="tfds")
    first, again = (
        open_source(tiny_tfds.options(each, cache, max_bad_share=0.5, source="tfds"))
        for each in (dataset, out)
    )
    assert (
        first.media
        == again.media
        == dict.fromkeys(("speech", "sound"), "audio")
        | {
            "points": "points",
            **dict.fromkeys(("scene", "view"), "video"),
        }
    )
    for split in ("train", "val"):
        assert first.manifest(split).fingerprint == again.manifest(split).fingerprint


def test_a_file_that_is_bad_inside_is_named_and_left_out(tmp_path, monkeypatch):
    """What was checked in part alone: here nothing was, as a later library may read less."""
    from unified_mm.data import manifest

    folder = write_rows(tmp_path / "data" / "train", 12).parent
    write_rows(folder / "val", 2)
    break_files(folder / "train")
    (folder / "train" / "0.flac").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "CHECKS", dict.fromkeys(manifest.CHECKS, lambda file: ""))
        out = tiny_tfds.prepare(folder, tmp_path / "out", tmp_path / "cache", fields=NAMED)
        data = tiny_tfds.options(out, tmp_path / "cache", source="tfds", max_bad_share=0.5)
        unchecked = open_source(data).manifest("train")
    assert len(unchecked.records) == 12
    log = Unreadable(str(tmp_path / "log"))
    modality = build_modalities({"sound": SOUND}, RESOURCES)
    records = [each for each in unchecked.records if each.id in ("n0", "n1")]
    batches = training_batches(records, modality, seed=0, batch_size=2, unreadable=log)
    assert not next(batches)["sound"]["present"].any()
    batches.close()
    named = {line.split("] ")[1].split(":")[0] for line in log.lines()}
    assert named == {"(train/0.flac)", "(train/1.flac)"}
    found = open_source(data.changed({"cache_dir": str(tmp_path / "other")})).manifest("train")
    bad = {problem.file: problem.what for problem in found.problems if problem.action == "left out"}
    assert set(bad) == {"train/0.flac", "train/1.flac", "train/6.npy"}
    assert {each.id for each in unchecked.records} - {each.id for each in found.records} == {
        "n0", "n1", "n6",
    }  # fmt: skip


def test_features_that_are_gone_are_named(made, tmp_path):
    copied = shutil.copytree(made[1], tmp_path / "dataset")
    told = json.loads((copied / "prepared.json").read_text())
    told["parts"]["smell"] = "audio"
    (copied / "prepared.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"prepared.json: parts is of parts/smell, which feat"):
        open_source(tiny_tfds.options(copied, tmp_path, source="tfds"))


def test_what_tfds_reads_itself(made):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(made[1])
    skip = {"image": tfds.decode.SkipDecoding()}
    example = builder.as_data_source("val", decoders=skip)[1]
    assert example["parts/speech"] == (made[0] / "val" / "1.wav").read_bytes()
    assert example["parts/scene"] == b"" and json.loads(example["told"])["labels"] == ["dog", "cat"]


def test_a_clip_of_a_container_is_read_inside(tmp_path):
    av = pytest.importorskip("av")
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for name in ("one", "two"):
            path = tmp_path / "data" / split / f"{name}.mp4"
            with av.open(str(path), "w") as container:
                stream = container.add_stream("mpeg4", rate=10)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
                for shade in range(0, 250, 25):
                    pixels = np.full((48, 64, 3), shade, np.uint8)
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
        rows = [{"video": f"{n}.mp4", "text": f"{n} clip"} for n in ("one", "two")]
        write_list(tmp_path / "data" / split, rows)
    out = tiny_tfds.prepare(tmp_path / "data", tmp_path / "out", tmp_path / "cache")
    clips = build_modalities({"video": CLIP}, RESOURCES)
    found = [
        open_source(tiny_tfds.options(each, tmp_path / "cache", **more)).manifest("train")
        for each, more in ((tmp_path / "data", {}), (out, {"source": "tfds"}))
    ]
    assert found[0].fingerprint == found[1].fingerprint
    equal(*(evaluation_batches(each.records, clips, batch_size=2) for each in found))
    assert next(evaluation_batches(found[1].records, clips, batch_size=2))["video"]["length"].all()


def test_questions_to_learn_from_stay_questions(tmp_path):
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.jpg")
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
    rows = [{"id": n, "image": f"{n}.jpg", "conversations": said} for n in range(2)]
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    out = tiny_tfds.prepare(tmp_path, tmp_path.parent / "out", tmp_path.parent / "cache")
    ours, theirs = (
        open_source(tiny_tfds.options(each, tmp_path.parent / "cache", **more)).manifest("train")
        for each, more in ((tmp_path, {}), (out, {"source": "tfds"}))
    )
    assert ours.fingerprint == theirs.fingerprint
    assert ours.records[0].texts == theirs.records[0].texts and ours.records[0].texts[0].prompt


def test_what_no_dataset_holds_is_refused(made, tmp_path, monkeypatch):
    from unified_mm.data import tfds_writer

    folder, _, cache = made
    with monkeypatch.context() as patch:
        patch.setattr(tfds_writer, "LARGEST", 2000)
        with pytest.raises(ValueError, match=r"'n\d+' of .* has files of .* and an example"):
            tiny_tfds.prepare(folder, tmp_path / "out", cache, fields=NAMED)
    built = ListedFolder._build

    def with_tone(self, split, sidecars):
        found = built(self, split, sidecars)
        first = replace(found.records[0], parts={"tone": [0.1, 0.2]})
        return replace(found, records=(first, *found.records[1:]))

    monkeypatch.setattr(ListedFolder, "_build", with_tone)
    with pytest.raises(ValueError, match="its tone is no file"):
        tiny_tfds.prepare(folder, tmp_path / "out", cache, fields=NAMED)


def test_a_size_of_pictures_is_refused_where_there_are_none(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        write_sound(tmp_path / "data" / split / "a.wav", 0.2)
        write_list(tmp_path / "data" / split, [{"audio": "a.wav", "text": "a dog"}])
    with pytest.raises(ValueError, match="--resize is of pictures, and .* has none"):
        tiny_tfds.prepare(tmp_path / "data", tmp_path / "out", tmp_path / "cache", Options(8))


def test_what_this_package_makes_stays_known_as_such(tmp_path, monkeypatch):
    from unified_mm.world import tones

    monkeypatch.setattr(tones, "SOUNDS", {"train": 2, "val": 1})
    out = tiny_tfds.prepare("", tmp_path / "out", tmp_path / "cache", source="sounds")
    theirs = open_source(tiny_tfds.options(out, tmp_path / "cache", source="tfds"))
    assert "'tones', WAS MADE BY THIS PACKAGE" in theirs.banner
    ours = open_source(tiny_tfds.options("", tmp_path / "cache", source="sounds"))
    assert ours.manifest("train").fingerprint == theirs.manifest("train").fingerprint
    assert {r.labels for r in theirs.manifest("train").records} == {(c,) for c in tones.CLASSES}


def test_questions_in_lists_of_their_own_are_not_lost_in_silence(tmp_path):
    answers = [{"answer": "a dog"}] * 10
    for split in ("train", "val"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{split}.jpg")
        rows = [{"image": f"{split}.jpg", "question": "What is it?", "answers": answers}]
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="the questions of 'train' are in lists of"):
        tiny_tfds.prepare(tmp_path, tmp_path.parent / "lost", tmp_path.parent / "cache")
