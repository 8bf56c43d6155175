"""Which fields and files are taken for sounds, shapes and videos, and which are something else."""

import ast
import io
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from unified_mm.data import clips, shapes
from unified_mm.data.coco import read_captions
from unified_mm.data.layouts import LAYOUTS, Folder
from unified_mm.data.sources import given_folder
from unified_mm.default_config import default_config


def picture(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file)


def parts_of(layout, folder):
    (listed,) = LAYOUTS[layout][1](Folder(folder)).values()
    return [(entry.image is not None, entry.parts) for entry in listed().entries]


def test_a_field_of_a_usual_name_that_names_no_file_is_none(tmp_path):
    picture(tmp_path / "a.jpg")
    line = {"file_name": "a.jpg", "text": "a dog", "points": 12, "video": "YFCC/v_abc", "mesh": ""}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    assert parts_of("imagefolder", tmp_path) == [(True, ())]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "list.csv").write_text("image,caption,points\na.jpg,a dog,3.5\n")
    assert parts_of("table", tmp_path) == [(True, ())]
    (tmp_path / "list.csv").write_text("image,caption,points\na.jpg,a dog,a.npz\n")
    assert parts_of("table", tmp_path) == [(True, (("points", tmp_path / "a.npz"),))]


def test_beside_a_picture_others_may_mean_something_else_in_coco_too(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    node = {"id": 1, "file_name": "a.jpg", "video": "train/v_abc", "points": 3, "audio": "a.wav"}
    (tmp_path / "annotations").mkdir()
    listed = {"images": [node], "annotations": [{"image_id": 1, "id": 1, "caption": "a dog"}]}
    (tmp_path / "annotations" / "captions_train.json").write_text(json.dumps(listed))
    (entry,) = read_captions(tmp_path, "train").entries
    assert [name for name, _ in entry.parts] == ["audio"] and entry.image is not None


def test_a_clip_beside_each_picture_is_no_example(tmp_path):
    for kind in ("cat", "dog"):
        picture(tmp_path / kind / "1.jpg")
        (tmp_path / kind / "1.mov").write_bytes(b"x")
    (listed,) = LAYOUTS["classes"][1](Folder(tmp_path)).values()
    assert [entry.image.name for entry in listed().entries] == ["1.jpg", "1.jpg"]


def test_what_a_modality_of_any_name_reads_is_what_its_field_says(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.gif", save_all=True)
    np.savez(tmp_path / "a.npz", frames=np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "train.csv").write_text("front,back,caption\na.gif,a.npz,a dog\n")
    shutil.copy(tmp_path / "train.csv", tmp_path / "val.csv")
    config = default_config()
    config.data.dir, config.data.fields.video = str(tmp_path), "front,back"
    (record,) = given_folder(config.data).manifest("train").records
    assert set(record.parts) == {"front", "back"}


@pytest.mark.parametrize("others", ["aaa.csv", "zzz.csv"])
def test_what_is_held_out_is_of_the_training_split_where_there_is_one(tmp_path, others):
    for number in range(40):
        picture(tmp_path / f"{number}.jpg")
    lines = [f"{number}.jpg,a dog" for number in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["image,caption", *lines[:30]]))
    (tmp_path / others).write_text("\n".join(["image,caption", *lines[30:]]))
    config = default_config()
    config.data.dir = str(tmp_path)
    source = given_folder(config.data)
    split = [source.manifest(name).records for name in ("train", "val")]
    assert sum(map(len, split)) == 30 and all(split)


def test_threads_parse_the_headers_of_arrays_one_at_a_time(tmp_path, monkeypatch):
    """CPython 3.11 raises a SystemError where two threads parse literals, as headers are."""
    np.savez(tmp_path / "clip.npz", frames=np.zeros((2, 8, 8, 3), np.uint8))
    np.save(tmp_path / "shape.npy", np.eye(3)[[0, 1, 2, 0]])
    parse, inside, most = ast.literal_eval, [], []

    def watched(header):
        inside.append(header)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return parse(header)

    monkeypatch.setattr(ast, "literal_eval", watched)
    readers = [(clips.check, tmp_path / "clip.npz"), (shapes.check, tmp_path / "shape.npy")] * 4
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda each: each[0](each[1]), readers)) == [""] * 8
    assert len(most) >= 8 and max(most) == 1


def test_threads_read_arrays_side_by_side(tmp_path, monkeypatch):
    """What follows a header is waited for by nobody else."""
    content = io.BytesIO()
    np.save(content, np.arange(300.0).reshape(100, 3))
    both = threading.Barrier(2, timeout=30)

    class Slow(io.BytesIO):
        def readinto(self, room):
            both.wait()
            return super().readinto(room)

        def read(self, size=-1):
            if size > 1000:  # no piece of the header
                both.wait()
            return super().read(size)

    monkeypatch.setattr(shapes.io, "BytesIO", Slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(shapes.read, [content.getvalue()] * 2))
    assert [len(each.points) for each in found] == [100, 100]
