"""A tiny COCO folder with everything that one may hold, and the dataset that is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
from PIL import Image

from unified_mm.config import Config
from unified_mm.data.sources import open_source
from unified_mm.data.tfds_examples import Options
from unified_mm.data.tfds_writer import write_dataset

SMALL = Options(shard_bytes=4000)  # a handful of shards


def options(folder: Path, cache: Path, **changes: Any) -> Config:
    """The data fields of a config."""
    fields = tiny.config_dict().data.to_dict()
    return Config(fields | {"dir": str(folder), "cache_dir": str(cache)} | changes)


def write_coco(folder: Path) -> Path:
    """Squares; and odd images, an example without image, one without captions, bad ones."""
    tiny.write_coco(folder, train=24, val=8)
    path = folder / "annotations" / "captions_train.json"
    content = json.loads(path.read_text())
    images = folder / "images" / "train"
    Image.new("L", (30, 20), 90).save(images / "grey.jpg")
    Image.new("RGBA", (20, 30), (9, 90, 200, 90)).save(images / "png.jpg", "PNG")
    (images / "cut.jpg").write_bytes((images / "0.jpg").read_bytes()[:200])
    odd = {100: "train/grey.jpg", 101: "train/png.jpg", 102: "train/cut.jpg", 103: None}
    content["images"] += [{"id": key, "file_name": name} for key, name in odd.items()]
    content["images"] += [{"id": 104, "file_name": "train/1.jpg"}]
    content["annotations"] += [
        {"id": 1000 + key, "image_id": key, "caption": f"ein Größe-{key} left of 日本"}
        for key in odd
    ]
    path.write_text(json.dumps(content))
    for split, ids in (("train", [3, 1, 100, 102]), ("val", [5, 0, 5])):
        write_beside(folder, split, ids)
    return folder


def write_beside(folder: Path, split: str, ids: list[int]) -> None:
    """Questions with answers and foils, in an order of their own."""
    questions = [
        {"question_id": 50 - n, "image_id": key, "question": f"what is {n}?"}
        for n, key in enumerate(ids)
    ]
    answers = [
        {
            "question_id": each["question_id"],
            "multiple_choice_answer": f"answer {each['image_id']}",
            "answers": [{"answer": f"answer {n % 3}"} for n in range(10)],
            "answer_type": "other",
            "question_type": "what is",
        }
        for each in questions
    ]
    foils = [
        {"image_id": key, "caption": "a red one", "foil": "a blue one", "kind": "colour"}
        for key in ids
    ]
    for name, value in (
        ("questions", {"questions": questions}),
        ("answers", {"annotations": answers}),
        ("foils", foils),
    ):
        path = folder / "annotations" / f"{name}_{split}.json"
        path.write_text(json.dumps(value))


def prepare(folder: Path, out: Path, cache: Path, written: Options = SMALL, **changes: Any) -> Path:
    """The dataset of a folder."""
    source = open_source(options(folder, cache, max_bad_share=0.5, **changes))
    write_dataset(source, out, written, lambda _: None)
    return out
