"""What is planted is planted as said, and what is found is judged by what it was made of."""

import numpy as np
from PIL import Image

from experiments.exchanged_captions import CAPTIONS, auroc, captions_of, plant
from experiments.planted_faults import judged, planted
from unified_mm.data.cleaning import Case, look_at, read_filter
from unified_mm.data.records import Manifest, Record
from unified_mm.files import read_json, write_json


def picture(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((48, 48), Image.Resampling.BICUBIC)


def test_pairs_of_one_origin_are_true_and_equal_pixels_are_doubles(tmp_path):
    for seed in range(20):
        picture(seed).save(tmp_path / f"{seed}.png")
    picture(0).save(tmp_path / "double.bmp")  # other bytes, the same pixels
    names = [*(f"{seed}.png" for seed in range(19)), "double.bmp"]
    train = [Record(name, {"image": str(tmp_path / name)}, (), True) for name in names]
    val = [Record("val", {"image": str(tmp_path / "19.png")}, (), True)]
    faulty, origins = planted(train, val, tmp_path)
    kinds = [str(record.id).split()[0] for record in faulty[20:]]
    assert kinds == ["same", "same", "mirrored", "crop", "blank", "leak"]
    parts = {"train": tuple(faulty), "val": tuple(val)}
    pictures = look_at(
        {split: Manifest(split, each, "", "", "") for split, each in parts.items()}, "train"
    )
    origins = [("val", 0), *origins]
    filters = dict(read_filter(name) for name in ("copies", "blank"))
    found = {name: (each, list(each(pictures))) for name, each in filters.items()}
    told = judged(pictures, origins, found)
    recalls = {kind: each["recall"] for kind, each in told["kinds"].items()}
    assert recalls == {"same": 1, "mirrored": 1, "crop": 0, "blank": 1, "leak": 1}
    counts = {
        reason: (each["true"], each["false"], each["doubles"])
        for reason, each in told["reasons"].items()
    }
    assert counts["the same file as"] == (3, 0, 0) and counts["a copy of"] == (0, 0, 1)
    assert counts["a mirror image of"] == (1, 0, 0) and counts["of one colour"] == (1, 0, 0)

    wrong = {"copies": (filters["copies"], [Case(4, 1.0, "a copy of", 2)])}
    told = judged(pictures, origins, wrong)
    assert told["reasons"]["a copy of"]["precision"] == 0
    ((*verdict, reason, measure, one, other),) = told["not planted"]
    assert verdict == ["false", "sound"] and (measure, one, other) == (1.0, "3.png", "1.png")
    assert reason == "a copy of train/sound 1.png"


def test_a_share_of_the_pictures_have_the_captions_of_another(tmp_path):
    folder = tmp_path / "folder"
    (folder / "images").mkdir(parents=True)
    ids = [f"id{i}" for i in range(20)]
    write_json(
        folder / CAPTIONS,
        {
            "images": [{"id": id, "file_name": f"{id}.jpg"} for id in ids],
            "annotations": [{"image_id": id, "caption": f"{n} {id}"} for n in (0, 1) for id in ids],
        },
    )
    write_json(folder / "annotations" / "captions_val.json", {"images": [], "annotations": []})
    plant(folder, tmp_path / "faulty", 0.3)
    before, now = captions_of(folder), captions_of(tmp_path / "faulty")
    moved = [id for id in ids if now[id] != before[id]]
    assert len(moved) == 6 and sorted(now.values()) == sorted(before.values())
    assert read_json(tmp_path / "faulty" / "annotations" / "captions_val.json")["images"] == []
    assert (tmp_path / "faulty" / "images").resolve() == folder / "images"
    plant(folder, tmp_path / "clean", 0.0)
    assert captions_of(tmp_path / "clean") == before


def test_auroc_counts_pairs_and_ties_by_half():
    low, high = np.array([0.0, 2.0, 3.0]), np.array([1.0, 3.0, 3.0, 4.0])
    pairs = [(a < b) + 0.5 * (a == b) for a in low for b in high]
    assert auroc(low, high) == np.mean(pairs)
