"""Parts and furniture as clouds of points: their classes, and titles that find them.

    python -m experiments.clouds --data=FOLDER --out=OUT
    python -m unified_mm.main --config=experiments/clouds.py:classes --config.data.dir=OUT \
        --workdir=runs/classes
    python -m unified_mm.main --config=experiments/clouds.py:titles --config.data.dir=OUT \
        --workdir=runs/titles
    python -m experiments.clouds --out=OUT --run=runs/titles

FOLDER has `points.npz` (`points` [rows, points, 3] as shares of `scale` [rows]) beside `meta.jsonl`
with title and category of each row. The first command writes a file a cloud with a list, a fifth
of the titles held out by name, and prints the control of classes: the nearest training cloud by the
three sizes alone. The last one prints the control of titles: the class's word alone as query.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from unified_mm.config import defaults_of
from unified_mm.default_config import default_config
from unified_mm.modalities.points import PointsModality


def get_config(what: str = "classes") -> ConfigDict:
    """Returns the config that learns `classes` or `titles`."""
    if what not in ("classes", "titles"):
        raise ValueError(f"{what!r}: give classes or titles")
    config = default_config()
    config.data.update({"val_rows": "held=yes", "vocabulary_size": 1500})
    config.data.fields.update({"points": "points", "caption": "title", "label": "category"})
    config.model.update({"width": 96, "layers": 3, "heads": 4, "feed_forward": 384})
    points = {"type": "points", **defaults_of(PointsModality)}
    points |= {"points": 512, "groups": 32, "group": 16, "hidden": 32, "stretch": 1.05}
    text = config.model.modalities.text.to_dict() | {"length": 32}
    config.train.update({"steps": 800, "batch_size": 48})
    config.train.update({"optimizer": "muon", "learning_rate": 8e-3})
    for objective in config.objectives.values():
        objective.weight = 0.0
    if what == "classes":
        config.model.modalities = {"points": points | {"mirror": True}}
        config.objectives.classification.update({"weight": 1.0, "of": "points", "smoothing": 0.1})
        return config
    config.model.fusion = "late"
    config.model.modalities = {"points": points, "text": text}
    config.objectives.contrastive.update({"weight": 1.0, "between": "points"})
    config.train.update({"batch_size": 96, "steps": 500})
    return config


def write(folder: Path, out: Path) -> list[dict[str, Any]]:
    """Writes a file a cloud and their list, and returns its rows with the sizes of each."""
    out.mkdir(parents=True)
    stored = dict(np.load(folder / "points.npz"))  # each is unpacked once
    rows = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    found = []
    for row in rows:
        points = stored["points"][row["row"]] / 32767.0 * stored["scale"][row["row"]]
        name = f"{row['row']}.npy"
        np.save(out / name, points.astype(np.float32))
        held = "yes" if zlib.crc32(row["title"].encode()) % 5 == 0 else "no"
        line = {"points": name, "title": row["title"], "category": row["category"], "held": held}
        found.append(line | {"sizes": np.ptp(points, axis=0)})
    lines = [{key: row[key] for key in row if key != "sizes"} for row in found]
    (out / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return found


def scores_of_sizes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns how often the nearest training cloud by three sizes is of the same class."""
    learned = [row for row in rows if row["held"] == "no"]
    held = [row for row in rows if row["held"] == "yes"]
    known = np.log(np.array([row["sizes"] for row in learned]) + 1e-3)
    right: dict[str, list[bool]] = {}
    for row in held:
        near = np.square(known - np.log(row["sizes"] + 1e-3)).sum(1).argmin()
        right.setdefault(row["category"], []).append(learned[near]["category"] == row["category"])
    counts = [len(each) for each in right.values()]
    return {
        "held out": len(held),
        "accuracy by sizes": float(np.concatenate(list(right.values())).mean()),
        "mean class by sizes": float(np.mean([np.mean(each) for each in right.values()])),
        "most frequent": max(counts) / len(held),
    }


def recall_of(run: str, out: Path) -> dict[str, float]:
    """Returns recall at 10 of held-out clouds by their titles, and by their class's word alone."""
    import unified_mm

    lines = (json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines())
    rows = [row for row in lines if row["held"] == "yes"]
    model = unified_mm.load(run)
    clouds = model.embed([out / row["points"] for row in rows], of="points")
    found = {}
    for name in ("title", "category"):
        similar = model.embed_texts([row[name] for row in rows]) @ clouds.T
        own = np.diag(similar)[:, None]
        # A half of those that score the same, itself apart, stand before it.
        before = (similar > own).sum(1) + 0.5 * ((similar == own).sum(1) - 1)
        found[f"recall_at_10 by {name}"] = float((before < 10).mean())
    return found


def main() -> None:
    """Writes the clouds, or scores a run, as the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", default="")
    given = parser.parse_args()
    if bool(given.data) == bool(given.run):
        parser.error("give --data, which is written to --out, or --run, which is scored on it")
    print(
        json.dumps(
            recall_of(given.run, given.out)
            if given.run
            else scores_of_sizes(write(given.data, given.out))
        )
    )


if __name__ == "__main__":
    main()
