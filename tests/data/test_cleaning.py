"""Planted faults are found, what is sound stays, and what is found is left out of training."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image, ImageFilter

from unified_mm import clean
from unified_mm.config import Config
from unified_mm.data import cleaning
from unified_mm.data.cleaning import (
    cleaned,
    differences,
    dropped_cases,
    look_at,
    near_pairs,
    of_sound_ones,
    perceptual_hashes,
    read_filter,
)
from unified_mm.data.records import Manifest, Record, Text, content_of
from unified_mm.data.sources import open_source
from unified_mm.evaluation.splits import read_manifest
from unified_mm.files import write_json

SOUND = 12


def photograph(seed):
    """Coloured noise as smooth as a photograph."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC)
    return large.filter(ImageFilter.GaussianBlur(1))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with twelve sound pictures, and planted ones; returns it and what they are."""
    folder = tmp_path_factory.mktemp("data")
    scored = photograph(100)
    brighter = np.clip(np.asarray(photograph(2)) * 1.3, 0, 255).astype(np.uint8)
    planted = {
        "same": photograph(0),
        "small": photograph(1).resize((48, 36)),
        "bright": Image.fromarray(brighter),
        "mirrored": photograph(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "leak": scored,
        "blank": Image.new("RGB", (96, 72), (7, 90, 200)),
        "tiny": photograph(50).resize((30, 40)),
        "strip": photograph(51).resize((320, 40)),
        "terse": photograph(52),
    }
    train = {f"sound{i}": photograph(i) for i in range(SOUND)} | planted
    for split, pictures in (("train", train), ("val", {"a": scored, "b": photograph(101)})):
        (folder / "images").mkdir(exist_ok=True)
        images, captions = [], []
        for number, (name, picture) in enumerate(pictures.items()):
            file = f"{split}_{name}.jpg"
            picture.save(folder / "images" / file, quality=90 if name != "same" else 30)
            images.append({"id": f"{name}", "file_name": file})
            text = "dog" if name == "terse" else f"{name} and what it shows"
            captions.append({"id": number, "image_id": f"{name}", "caption": text})
        content = {"images": images, "annotations": captions}
        write_json(folder / "annotations" / f"captions_{split}.json", content)
    return folder, planted


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        clean.main(arguments)
    return stopped.value.code


def test_what_is_planted_is_found_and_left_out_of_training(data, tmp_path, capsys):
    folder, planted = data
    out, where = tmp_path / "out", f"--config.data.dir={folder}"
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    assert run("--config=coco:tiny", where, cache, f"--out={out}") == 0
    said = capsys.readouterr().out
    assert f"9 of {SOUND + 9}" in said and "copies: 5 dropped" in said
    assert f"coco train: {SOUND + 9} images" in said  # and what cannot be read of them
    manifest = json.loads((out / "manifest.json").read_text())
    found = {each["id"]: each for each in manifest["examples"]}
    assert set(found) == set(planted)
    reasons = {name: each["reason"] for name, each in found.items()}
    assert reasons["leak"] == "the same file as val/a, which is scored on"
    assert reasons["mirrored"] == "a mirror image of train/sound3"
    assert reasons["bright"] == "a copy of train/sound2"
    assert reasons["tiny"] == "30 pixels on a side" and reasons["strip"] == "320 x 40 pixels"
    page = (out / "report.html").read_text()
    assert "train/bright: a copy of train/sound2" in page and "data:image/png" in page

    config = Config(
        tiny.config_dict(
            data__dir=str(folder),
            data__cache_dir=str(tmp_path / "cache"),
            data__manifest=str(out / "manifest.json"),
        ).to_dict()
    )
    source = open_source(config.data)
    kept = read_manifest(config, source, "train", {})
    assert [record.id for record in kept.records] == [f"sound{i}" for i in range(SOUND)]
    assert kept.fingerprint != source.manifest("train").fingerprint
    assert read_manifest(config, source, "val", {}) == source.manifest("val")
    with pytest.raises(ValueError, match="was made of other data"):
        cleaned(config.data, kept)


def test_a_filter_is_named_once(data, tmp_path, capsys):
    twice = ("--filter=small,threshold=20", "--filter=small,threshold=40")
    where = f"--config.data.dir={data[0]}"
    assert run("--config=coco:tiny", where, *twice, f"--out={tmp_path / 'out'}") == 1
    assert "--filter: each once, not small, small" in capsys.readouterr().err


def test_a_sound_copy_of_what_is_faulty_stays(data):
    source = open_source(Config(tiny.config_dict(data__dir=str(data[0])).to_dict()).data)
    pictures = look_at({"train": source.manifest("train")}, "train")
    filters = dict(read_filter(each) for each in ("copies", "small,threshold=60", "terse"))
    of = {record.id: place for place, record in enumerate(pictures.records)}
    # "small" stands for the first, of which "sound1" is then a copy.
    order = [of["small"], of["sound1"], of["same"], of["sound0"]]
    some = replace(
        pictures,
        splits=("train",) * 4,
        records=tuple(pictures.records[place] for place in order),
        trained=pictures.trained[order],
        digests=tuple(pictures.digests[place] for place in order),
        sizes=pictures.sizes[order],
        small=pictures.small[order],
    )
    found = of_sound_ones({name: (each, list(each(some))) for name, each in filters.items()})
    dropped = {
        some.records[case.place].id
        for each, cases in found.values()
        for case in cases
        if case.measure <= each.threshold
    }
    assert dropped == {"small", "sound0"}


def test_examples_without_a_picture_are_copies_where_all_their_files_are(tmp_path, monkeypatch):
    """Files of which none is as large are not read."""
    for name, content in {"a": b"one", "b": b"two", "c": b"one", "d": b"another"}.items():
        (tmp_path / name).write_bytes(content)
    named = {"a": "a", "other": "b", "copy": "c", "large": "d", "both": "ab", "both again": "cb"}
    records = [
        Record(name, {kind: str(tmp_path / file) for kind, file in zip(("audio", "video"), files)},
               (), True)
        for name, files in named.items()
    ]  # fmt: skip
    records.append(Record("made", {"audio": {"made": "noise", "seed": 1}}, (), True))
    read = []
    monkeypatch.setattr(cleaning, "content_of", lambda part: read.append(part) or content_of(part))
    pictures = look_at({"train": Manifest("train", tuple(records), "", "", "")}, "train")
    cases = list(read_filter("copies")[1](pictures))
    said = {records[case.place].id: records[case.other].id for case in cases}
    assert said == {"copy": "a", "both again": "both"}
    assert str(tmp_path / "d") not in read


def test_of_copies_of_what_is_faulty_the_first_sound_one_stays(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_bytes(b"one")
    captions = {"a": "dog", "b": "a dog barks", "c": "the dog barks", "d": "a dog"}
    records = tuple(
        Record(name, {"audio": str(tmp_path / name)}, (Text("", caption),), True)
        for name, caption in captions.items()
    )
    pictures = look_at({"train": Manifest("train", records, "", "", "")}, "train")
    filters = dict(read_filter(each) for each in ("copies", "terse"))
    found = of_sound_ones({name: (each, list(each(pictures))) for name, each in filters.items()})
    dropped = {place: pictures.told(case) for place, (_, case) in dropped_cases(found).items()}
    assert dropped.keys() == {0, 2, 3}
    assert dropped[2] == dropped[3] == "the same file as train/b"


def test_each_copy_of_many_is_told_once(tmp_path):
    """A placeholder that stands for thousands is not compared with itself."""
    for number in range(40):
        Image.new("RGB", (32, 32), (9, 90, 200)).save(tmp_path / f"{number}.png")
    records = tuple(Record(n, {"image": str(tmp_path / f"{n}.png")}, (), True) for n in range(40))
    pictures = look_at({"train": Manifest("train", records, "", "", "")}, "train")
    cases = list(read_filter("copies")[1](pictures))
    assert [(case.place, case.other) for case in cases] == [(place, 0) for place in range(1, 40)]


def test_what_is_no_caption_of_one_word_is_not_terse():
    texts = {
        "terse": (Text("", "dog"),),
        "a character": (Text("", "狗"),),
        "unspaced": (Text("", "一只狗在跑"),),
        "answer": (Text("what is it?", "dog"),),
        "none": (),
    }
    records = [Record(name, {}, found, True) for name, found in texts.items()]
    records.append(Record("class", {}, (Text("", "dog"),), True, ("dog",)))
    pictures = look_at({"train": Manifest("train", tuple(records), "", "", "")}, "train")
    cases = [case for case in read_filter("terse")[1](pictures) if case.measure <= 1]
    assert [records[case.place].id for case in cases] == ["terse", "a character"]


def of_captions(*captions):
    """Pictures' records with captions, the first of them scored on."""
    records = tuple(
        Record(place, {}, tuple(Text("", each) for each in texts), True)
        for place, texts in enumerate(captions)
    )
    split = {"val": records[:1], "train": records[1:]}
    manifests = {name: Manifest(name, own, "", "", "") for name, own in split.items()}
    return look_at(manifests, "train")


def test_captions_that_many_have_are_repeated():
    """An example with a caption of its own stays; what is scored on is not counted."""
    pictures = of_captions(
        ("IMG",), *[("IMG", "IMG ")] * 4, ("IMG", "a dog"), ("a cat",), ("a cat",)
    )
    found = {
        case.place: case.measure for case in read_filter("repeated,threshold=0.2")[1](pictures)
    }
    assert found == dict.fromkeys((1, 2, 3, 4), 0.2)
    assert not list(read_filter("repeated")[1](of_captions(("a dog",), ("a dog",), ())))


def test_a_script_that_is_not_expected_is_found():
    pictures = of_captions(
        ("собака",), ("a dog, 12!",), ("собака бежит",), ("a собака",), ("犬が走る",), ("42",),
        ("some cats on a wall",),
    )  # fmt: skip
    dropped = {}
    for given in ("script", "script,script=CJK", "script,script=CYRILLIC,threshold=0.1"):
        each = read_filter(given)[1]
        cases = [case for case in each(pictures) if case.measure <= each.threshold]
        dropped[given] = {case.place for case in cases}
    assert dropped == {
        "script": {2, 3, 4},
        "script,script=CJK": {1, 2, 3, 6},
        "script,script=CYRILLIC,threshold=0.1": {1, 4, 6},
    }


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    record = Record("bad", {"image": str(tmp_path / "bad.jpg")}, (), True)
    with pytest.raises(ValueError, match="bad.jpg cannot be decoded"):
        look_at({"train": Manifest("train", (record,), "", "", "")}, "train")


def test_a_look_that_was_stopped_goes_on_and_is_the_same(data, tmp_path, monkeypatch):
    manifest = open_source(Config(tiny.config_dict(data__dir=str(data[0])).to_dict()).data)
    manifests = {split: manifest.manifest(split) for split in ("train", "val")}
    whole, opened, read = look_at(manifests, "train"), [], cleaning.content_of
    monkeypatch.setattr(cleaning, "PART", 5)

    def reading(file, until):
        if len(opened) == until:
            raise KeyboardInterrupt
        opened.append(file)
        return read(file)

    monkeypatch.setattr(cleaning, "content_of", lambda file: reading(file, 13))
    with pytest.raises(KeyboardInterrupt):
        look_at(manifests, "train", tmp_path, threads=1)
    opened.clear()
    monkeypatch.setattr(cleaning, "content_of", lambda file: reading(file, None))
    found = look_at(manifests, "train", tmp_path, threads=1)
    assert len(opened) == SOUND + 9 + 2 - 10  # two parts were kept
    for name in ("sizes", "small", "trained"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert found.digests == whole.digests and found.records == whole.records
    opened.clear()
    look_at(manifests, "train", tmp_path, threads=1)
    assert not opened
    first, *_ = sorted((tmp_path / "looked").iterdir())
    first.write_bytes(first.read_bytes()[:-99])
    with pytest.raises(ValueError, match="is damaged: delete it, and it is made again"):
        look_at(manifests, "train", tmp_path)


def test_a_manifest_of_another_split_than_is_trained_on_is_refused(data, tmp_path):
    out = tmp_path / "out"
    where = (f"--config.data.dir={data[0]}", f"--config.data.cache_dir={tmp_path / 'cache'}")
    assert run("--config=coco:tiny", *where, f"--out={out}", "--filter=blank") == 0
    changes = {"data__dir": str(data[0]), "data__manifest": str(out / "manifest.json")}
    config = Config(tiny.config_dict(**changes, data__train_split="val").to_dict())
    with pytest.raises(ValueError, match="made of 'train', and data.train_split='val' is trained"):
        read_manifest(config, open_source(config.data), "val", {})


def test_all_pairs_of_near_hashes_are_found_once():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 40).astype(np.uint64)
    hashes[31], hashes[7] = hashes[3] ^ np.uint64(0b101), hashes[3]
    found = [(int(i), int(j)) for pair in near_pairs(hashes, hashes, 2, 8) for i, j in zip(*pair)]
    assert sorted(found) == [(3, 7), (3, 31), (7, 31)]


def test_a_hash_says_nothing_of_brightness_and_differences_tell_pictures_apart():
    dark, other = (np.asarray(photograph(i).resize((32, 32)))[None] // 2 for i in range(2))
    bright = (dark * 1.5).astype(np.uint8)
    (one,), (two,) = perceptual_hashes(dark), perceptual_hashes(bright)
    assert np.bitwise_count(one ^ two) <= 2
    assert differences(dark, bright)[0] < 2 and differences(bright, dark)[0] < 2
    assert differences(dark, other)[0] > 30


def test_a_filter_has_options_of_its_own():
    name, found = read_filter("copies,threshold=20,bits=4,mirrored=false")
    assert (name, found.threshold, found.bits, found.mirrored) == ("copies", 20.0, 4, False)
    for given, named in (("copys", "Did you mean 'copies'"), ("blank,bits=3", "no such option"),
                         ("blank,threshold=x", "must be a float"), ("blank,3", "name=value"),
                         ("copies,bits=40", "at most 32")):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            read_filter(given)


def test_what_is_no_such_manifest_is_refused(data, tmp_path):
    path = Path(tmp_path / "other.json")
    config = Config(tiny.config_dict(data__dir=str(data[0]), data__manifest=str(path)).to_dict())
    source = open_source(config.data)
    write_json(path, {"format": 9})
    with pytest.raises(ValueError, match="no manifest that unified_mm.clean wrote"):
        read_manifest(config, source, "train", {})
