"""The manifest: every fault of a folder found, named and counted; unchanged data checked once."""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unified_mm.data import coco, images
from unified_mm.data.manifest import (
    Sidecar,
    build_manifest,
    fingerprint,
    from_json,
    names_sides,
    summary,
    to_json,
    with_questions,
)
from unified_mm.data.records import Problem, Text


def coded(seed=0, format="JPEG", mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((48, 32)).convert(mode)
    out = io.BytesIO()
    picture.save(out, format)
    return out.getvalue()


def write(folder, files, captions=None, **info):
    """files: name -> bytes, or None for a listed file that is missing. Ids count from 1."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for name, data in files.items():
        if data is not None:
            (folder / "images" / name).write_bytes(data)
    listed = [{"id": i, "file_name": name} for i, name in enumerate(files, 1)]
    captions = captions or [(i, f"picture {i}") for i in range(1, len(files) + 1)]
    annotations = [{"id": i, "image_id": c[0], "caption": c[1]} for i, c in enumerate(captions)]
    data = {"info": info, "images": listed, "annotations": annotations}
    (folder / "annotations" / "captions_train.json").write_text(json.dumps(data))


def build(folder, **options):
    listed = coco.read_captions(folder, "train")
    return build_manifest(listed, folder, "train", threads=2, progress=False, **options)


@pytest.fixture
def good(tmp_path):
    """Four good pictures."""
    write(tmp_path / "data", {f"{i}.jpg": coded(i) for i in range(4)})
    return tmp_path / "data"


def test_good_folder_becomes_records_in_order(good):
    manifest = build(good)
    assert [r.id for r in manifest.records] == [1, 2, 3, 4]
    assert manifest.records[2].image == str(good / "images" / "2.jpg")
    assert manifest.records[2].texts == (Text("", "picture 3"),)
    assert all(r.mirrorable for r in manifest.records)
    assert (manifest.split, manifest.source, manifest.folder) == ("train", "coco", str(good))
    assert manifest.problems == ()


def test_every_fault_of_a_file_is_named(tmp_path):
    jpeg = coded()
    write(
        tmp_path,
        {
            "whole.jpg": jpeg,
            "cut.jpg": jpeg[: len(jpeg) * 2 // 3],
            "empty.jpg": b"",
            "page.jpg": b"<html></html>",
            "gone.jpg": None,
            "really.jpg": coded(format="PNG"),
            "print.jpg": coded(mode="CMYK"),
            "grey.jpg": coded(mode="L"),
        },
    )
    manifest = build(tmp_path, max_bad_share=0.5)
    assert [r.id for r in manifest.records] == [1, 6, 7, 8]
    assert set(manifest.problems) == {
        Problem("cut.jpg", "image file is truncated", "left out"),
        Problem("empty.jpg", "the file is empty", "left out"),
        Problem("page.jpg", "not an image of a known format", "left out"),
        Problem("gone.jpg", "missing image", "left out"),
        Problem("really.jpg", "PNG named .jpg", "converted"),
        Problem("print.jpg", "CMYK", "converted"),
        Problem("grey.jpg", "greyscale", "converted"),
    }


def test_too_many_bad_files_stop_with_names_and_field(tmp_path):
    files = {f"{i:02}.jpg": b"" if i < 12 else coded() for i in range(24)}
    write(tmp_path, files)
    with pytest.raises(ValueError) as caught:
        build(tmp_path, max_bad_share=0.49)
    message = str(caught.value)
    assert "12 of the 24 images" in message and "50.0%" in message and "49.0%" in message
    assert "data.max_bad_share" in message
    assert message.count(".jpg") == 10 and "00.jpg" in message and "09.jpg" in message
    assert len(build(tmp_path, max_bad_share=0.5).records) == 12


def test_no_good_file_stops_whatever_the_share(tmp_path):
    write(tmp_path, {"a.jpg": b""})
    with pytest.raises(ValueError, match=r"1 of the 1 images.*a\.jpg \(the file is empty\)"):
        build(tmp_path, max_bad_share=1.0)


def test_too_many_bad_captions_stop_with_names_and_hint(tmp_path):
    write(tmp_path, {"a.jpg": coded(), "b.jpg": coded()}, [(1, "one"), ("2", "two")])
    with pytest.raises(ValueError) as caught:
        build(tmp_path, max_bad_share=0.49)
    message = str(caught.value)
    assert "1 of the 2 captions of 'train'" in message and "annotations[1]" in message
    assert "The id 2 of images is written '2' here" in message
    assert len(build(tmp_path, max_bad_share=0.5).records) == 2


def test_what_lies_beside_is_counted_and_too_many_strangers_stop(good):
    few = Sidecar("foil", [1, 2, 9], 0.5)
    manifest = build(good, sidecars=[few, Sidecar("question", [], 0.0)])
    assert manifest.problems == (
        Problem("foil 2", "foil on an image that is not listed", "left out"),
    )
    assert "left out: 1 x foil on an image that is not listed (foil 2)" in summary(manifest)
    with pytest.raises(ValueError, match=r"2 of the 3 foils .*first foil 1 .*The id 2 of images"):
        build(good, sidecars=[Sidecar("foil", [1, "2", "3"], 0.5)])
    with pytest.raises(ValueError, match="2 of the 2 questions"):
        build(good, sidecars=[Sidecar("question", [8, 9], 1.0)])


def test_folders_whose_names_are_no_utf_8_can_be_cached(tmp_path):
    folder = tmp_path / os.fsdecode(b"d\xff")
    write(folder, {"a.jpg": coded()})
    first = build(folder, cache=tmp_path / "cache")
    assert build(folder, cache=tmp_path / "cache") == first


def test_a_cache_that_cannot_be_written_is_named(good, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*/file: Not a directory"):
        build(good, cache=tmp_path / "file")


def test_captions_that_name_sides_are_not_mirrored(tmp_path):
    texts = [
        "the cube on the left",
        "on the RIGHT.",
        "bright leftovers",
        "the rightmost ball",
        "猫",
    ]
    write(
        tmp_path,
        {f"{i}.jpg": coded() for i in range(5)},
        [(i, text) for i, text in enumerate(texts, 1)] + [(5, "a cat")],
    )
    assert [r.mirrorable for r in build(tmp_path).records] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("said", "sided"),
    [("LeftHand drive", True), ("the left_side door", True), ("right-handed", True),
     ("rightside", True), ("righty", True), ("upright", False), ("righteous", False),
     ("leftist", False), ("brightly", False), ("left1", True)],
)  # fmt: skip
def test_words_made_of_sides_name_sides(said, sided):
    assert names_sides([Text("", f"a {said} thing")]) == sided


def test_sides_that_were_learned_later_leave_the_fingerprint(tmp_path):
    """A run of data with such a caption was begun when the picture still counted as mirrorable."""
    write(tmp_path, {"a.jpg": coded()}, [(1, "lefthand drive")])
    (record,) = build(tmp_path).records
    assert not record.mirrorable
    sizes = {record.image: Path(record.image).stat().st_size}
    text = [["", "lefthand drive"]]
    then = hashlib.sha256(json.dumps([1, sizes[record.image], text, True]).encode()).hexdigest()
    assert fingerprint([record], sizes) == build(tmp_path).fingerprint == then


def test_directional_data_is_never_mirrored(tmp_path):
    write(tmp_path, {"a.jpg": coded()}, directional=True)
    assert not build(tmp_path, source="world").records[0].mirrorable


def question(image_id, text, answer="yes", id=1):
    return coco.Question(id, image_id, text, answer, (answer,) * 10, "yes/no", "is there")


def test_questions_become_texts_of_their_images(good):
    manifest = build(good)
    asked = with_questions(
        manifest, [question(2, "Is there a cat?"), question(3, "Is it left of the dog?", "no")]
    )
    assert asked.records[0] == manifest.records[0]
    assert asked.records[1].texts == (Text("", "picture 2"), Text("Is there a cat?", "yes"))
    assert [r.mirrorable for r in asked.records] == [True, True, False, True]
    assert asked.fingerprint != manifest.fingerprint


def test_json_gives_an_equal_manifest_back(tmp_path):
    write(tmp_path, {"a.jpg": coded(), "b.jpg": coded(mode="L")}, [(1, "猫 left"), (1, "")])
    manifest = build(tmp_path, max_bad_share=0.5)
    assert from_json(to_json(manifest), {}) == manifest


def count_checks(monkeypatch):
    checked = []
    check = images.check

    def counting(path, named=None):
        checked.append(os.path.basename(path))
        return check(path, named)

    monkeypatch.setattr(images, "check", counting)
    return checked


def test_unchanged_data_is_decoded_once(good, tmp_path, monkeypatch):
    checked = count_checks(monkeypatch)
    first = build(good, cache=tmp_path / "cache")
    assert sorted(checked) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert build(good, cache=tmp_path / "cache") == first
    assert len(checked) == 4
    assert len(list((tmp_path / "cache" / "manifests").iterdir())) == 1


def touch(folder):
    os.utime(folder / "images" / "1.jpg", ns=(1, 1))


def remove(folder):
    (folder / "images" / "1.jpg").unlink()


def replace(folder):
    (folder / "images" / "1.jpg").write_bytes(coded(9))


def replace_keeping_time(folder):
    path = folder / "images" / "1.jpg"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-9])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rewrite(folder):
    path = folder / "annotations" / "captions_train.json"
    path.write_text(path.read_text().replace("picture 2", "picture two"))


@pytest.mark.parametrize("change", [touch, remove, replace, replace_keeping_time, rewrite])
def test_changed_data_is_checked_again(good, tmp_path, monkeypatch, change):
    build(good, cache=tmp_path / "cache")
    change(good)
    checked = count_checks(monkeypatch)
    fresh = build(good, cache=tmp_path / "cache", max_bad_share=0.5)
    assert checked and fresh == build(good, max_bad_share=0.5)


def test_cached_bad_files_still_stop_the_run(tmp_path):
    write(tmp_path / "data", {"a.jpg": coded(), "b.jpg": b""})
    build(tmp_path / "data", cache=tmp_path, max_bad_share=0.5)
    with pytest.raises(ValueError, match=r"1 of the 2 images.*b\.jpg"):
        build(tmp_path / "data", cache=tmp_path)


def test_damaged_cache_is_an_error_that_names_it(good, tmp_path):
    build(good, cache=tmp_path)
    (kept,) = (tmp_path / "manifests").iterdir()
    kept.write_text(kept.read_text()[:-20])
    with pytest.raises(ValueError, match=f"{kept.name} is damaged.*delete it"):
        build(good, cache=tmp_path)


def test_a_cache_of_other_examples_is_damaged(good, tmp_path):
    build(good, cache=tmp_path)
    (kept,) = (tmp_path / "manifests").iterdir()
    kept.write_text(kept.read_text().replace('"id": 4', '"id": 5'))
    with pytest.raises(ValueError, match=f"{kept.name} is damaged.*delete it"):
        build(good, cache=tmp_path)


def test_fingerprint_follows_what_training_sees(good, tmp_path):
    first = build(good).fingerprint
    touch(good)
    assert build(good).fingerprint == first
    elsewhere = tmp_path / "moved"
    good.rename(elsewhere)
    assert build(elsewhere).fingerprint == first
    rewrite(elsewhere)
    second = build(elsewhere).fingerprint
    assert second != first
    replace(elsewhere)
    assert build(elsewhere).fingerprint != second


def test_summary_counts_everything(tmp_path):
    write(
        tmp_path,
        {"a.jpg": coded(), "b.jpg": b"", "c.jpg": b"", "d.jpg": coded(mode="L")},
        [(1, "left"), (1, " "), (2, "two"), (3, "three")],
    )
    text = summary(build(tmp_path, max_bad_share=0.5))
    assert text == (
        f"coco train: 2 images and 1 texts in 2 examples from {tmp_path}; 1 without text; "
        "1 never mirrored; converted: 1 x greyscale (d.jpg); left out: 1 x empty caption "
        "(captions_train.json: annotations[1]); left out: 2 x the file is empty (b.jpg, c.jpg)."
    )


def test_of_a_large_set_a_fixed_sample_is_decoded(tmp_path):
    files = {f"{number}.jpg": coded(number) for number in range(30)} | {"gone.jpg": None}
    files |= {f"bad{number}.jpg": b"no picture" for number in range(10)}
    write(tmp_path, files)
    first, second = (
        build(tmp_path, check_at_most=12, max_bad_share=0.9, cache=cache)
        for cache in (None, tmp_path / "cache")
    )
    assert first == second and first.unchecked == 29
    assert "29 images are not decoded before they are met" in summary(first)
    out = [problem.file for problem in first.problems]
    assert "gone.jpg" in out and 1 <= len(out) - 1 < 10  # what is not there is always known
    more = build(tmp_path, check_at_most=20, max_bad_share=0.9)
    assert set(out) <= {problem.file for problem in more.problems}
    assert build(tmp_path, max_bad_share=0.9).unchecked == 0
