"""Captions exchanged among a share of the training pictures, and what finds them.

    python -m experiments.exchanged_captions plant FOLDER --share=0.1 --out=FAULTY
    python -m unified_mm.main ... --config.data.dir=FAULTY --workdir=RUN
    python -m experiments.exchanged_captions score FAULTY --of=FOLDER --run=RUN --out=FILE

FOLDER is in the layout of MS-COCO; FAULTY is the same but for its training captions, and links to
the rest. All captions of a picture move together, to another one of those that are exchanged.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from unified_mm.files import new_folder, read_json, write_json

CAPTIONS = Path("annotations") / "captions_train.json"


def exchanged(content: dict[str, Any], share: float, seed: int = 0) -> dict[str, Any]:
    """Returns annotations in which a share of the pictures have the captions of another."""
    ids = [image["id"] for image in content["images"]]
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(ids), round(share * len(ids)), replace=False)
    # A circle through all of them in random order: none keeps its own.
    following = dict(zip(chosen.tolist(), np.roll(chosen, 1).tolist(), strict=True))
    moved = {ids[one]: ids[other] for one, other in following.items()}
    captions = [
        each | {"image_id": moved.get(each["image_id"], each["image_id"])}
        for each in content["annotations"]
    ]
    return content | {"annotations": captions}


def plant(folder: Path, out: Path, share: float) -> None:
    """Writes the folder with exchanged captions; everything else is linked."""
    with new_folder(out) as half:
        (half / "annotations").mkdir()
        of_captions = (folder / "annotations").iterdir()
        for path in (*folder.iterdir(), *of_captions):
            name = path.relative_to(folder)
            if name not in (CAPTIONS, CAPTIONS.parent):
                (half / name).symlink_to(path.resolve())
        write_json(half / CAPTIONS, exchanged(read_json(folder / CAPTIONS), share))


def captions_of(folder: Path) -> dict[Any, list[str]]:
    """Returns the training captions of each picture."""
    found: dict[Any, list[str]] = {}
    for each in read_json(folder / CAPTIONS)["annotations"]:
        found.setdefault(each["image_id"], []).append(each["caption"])
    return found


def auroc(low: np.ndarray, high: np.ndarray) -> float:
    """Returns how often one of `low` is below one of `high`; ties count half."""
    ordered = np.sort(high)
    below = np.searchsorted(ordered, low, "right") + np.searchsorted(ordered, low, "left")
    return float(1 - below.mean() / (2 * len(high)))


def score(faulty: Path, folder: Path, run: str) -> dict[str, Any]:
    """Returns how well a run's agreement tells exchanged captions from others."""
    from unified_mm.config import Config
    from unified_mm.data.sources import open_source
    from unified_mm.default_config import default_config
    from unified_mm.inference.loaded import load
    from unified_mm.search.cleaning import agreement

    config = default_config()
    config.data.dir, config.data.source = str(faulty), "coco"
    records = open_source(Config(config.to_dict()).data).manifest("train").records
    files = [record.image for record in records]
    model = load(run)
    cosines = agreement(model, files, [[t.target for t in record.texts] for record in records])
    now, before = captions_of(faulty), captions_of(folder)
    wrong = np.array([now[record.id] != before[record.id] for record in records])
    worst = np.argsort(cosines)[: wrong.sum()]
    return {
        "pictures": len(records),
        "exchanged": int(wrong.sum()),
        "step": model.step,
        "auroc": auroc(cosines[wrong], cosines[~wrong]),
        "mean cosine": {
            "exchanged": float(cosines[wrong].mean()),
            "own": float(cosines[~wrong].mean()),
        },
        "of as many that fit worst, exchanged": float(wrong[worst].mean()),
    }


def main() -> None:
    """Plants, or scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("plant", "score"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--of", type=Path, help="what captions were before")
    parser.add_argument("--run", help="a run that was trained on the folder")
    options = parser.parse_args()
    if options.action == "plant":
        plant(options.folder, options.out, options.share)
        return
    if not (options.of and options.run):
        parser.error("score needs --of and --run")
    found = score(options.folder, options.of, options.run)
    write_json(options.out, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
