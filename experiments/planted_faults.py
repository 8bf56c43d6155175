"""Faults planted among sound pictures, and what `unified_mm.data.cleaning` finds of them.

    python -m experiments.planted_faults FOLDER --scratch=DIR

FOLDER is in the layout of MS-COCO. Of its first 6,000 training pictures, 10% are there again as
they are, 10% re-encoded (JPEG of quality 30; half the size; 1.3 times as bright), 5% mirrored, 5%
as crops of 0.85 of their area; 5% more are of one colour, and as many are copied from `val`.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unified_mm.config import Config
from unified_mm.data.cleaning import FILTERS, look_at
from unified_mm.data.records import Manifest, Record, Text
from unified_mm.data.sources import open_source
from unified_mm.default_config import default_config

SHARES = {
    "same": 0.10,
    "jpeg": 0.034,
    "half": 0.033,
    "bright": 0.033,
    "mirrored": 0.05,
    "crop": 0.05,
    "blank": 0.05,
    "leak": 0.05,
}


def altered(kind: str, picture: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, int]:
    """Returns a picture with a fault, and the quality that it is saved with."""
    width, height = picture.size
    if kind == "jpeg":
        return picture, 30
    if kind == "half":
        return picture.resize((width // 2, height // 2), Image.Resampling.BICUBIC), 90
    if kind == "bright":
        pixels = np.clip(np.asarray(picture) * 1.3, 0, 255).astype(np.uint8)
        return Image.fromarray(pixels), 90
    if kind == "mirrored":
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 95
    if kind == "crop":
        sides = [int(side * 0.85**0.5) for side in (width, height)]
        left = int(rng.integers(0, width - sides[0] + 1))
        top = int(rng.integers(0, height - sides[1] + 1))
        return picture.crop((left, top, left + sides[0], top + sides[1])), 95
    return Image.new("RGB", picture.size, tuple(rng.integers(0, 256, 3).tolist())), 95


def planted(train: Any, val: Any, scratch: Path) -> list[Record]:
    """Returns the training records, and after them the faults; an id begins with the kind."""
    rng = np.random.default_rng(0)
    text = (Text("", "a b c"),)
    found = [Record(f"sound {record.id}", record.parts, text, True) for record in train]
    for kind, share in SHARES.items():
        origin = val if kind == "leak" else train
        for number in rng.choice(len(origin), int(share * len(train)), replace=False):
            image = origin[number].image
            if kind not in ("same", "leak"):
                with Image.open(image) as opened:
                    picture, quality = altered(kind, opened.convert("RGB"), rng)
                image = str(scratch / f"{kind}{number}.jpg")
                picture.save(image, "JPEG", quality=quality)
            found.append(Record(f"{kind} {number}", {"image": image}, text, True))
    return found


def main() -> None:
    """Prints, for each filter and kind of fault, how many are dropped of how many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--scratch", type=Path, required=True)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    config = default_config()
    config.data.dir, config.data.source = options.folder, "coco"
    source = open_source(Config(config.to_dict()).data)
    train, val = (source.manifest(split).records for split in ("train", "val"))
    records = {"train": planted(train[:6000], val[:1000], options.scratch), "val": val[:1000]}
    manifests = {
        split: Manifest(split, tuple(each), "planted", options.folder, "")
        for split, each in records.items()
    }
    began = time.process_time()
    pictures = look_at(manifests, "train")
    print(f"{len(pictures.records):,} pictures are read in {time.process_time() - began:.1f} CPU s")
    kinds = [str(record.id).split()[0] for record in pictures.records]
    there = Counter(np.array(kinds)[pictures.trained].tolist())
    for name in ("copies", "blank"):
        began, each = time.process_time(), FILTERS[name]()
        places = {case.place for case in each(pictures) if case.measure <= each.threshold}
        found = Counter(kinds[place] for place in places)
        said = ", ".join(f"{kind} {found[kind]}/{there[kind]}" for kind in there)
        print(f"{name} ({time.process_time() - began:.1f} CPU s): {said}")


if __name__ == "__main__":
    main()
