"""Measures `unified_mm.clean` on many pictures: time and memory, killed in the middle and again.

    python -m experiments.clean_at_scale PICTURES --scratch=DIR --stop=120 --out=FILE

The pictures are crops of those in the folder PICTURES, brighter or darker, and half of them
mirrored, all in one csv; a tenth is held out by name. The first command is killed after `--stop`
seconds, the second one ends.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from unified_mm.benchmarks.timing import provenance
from unified_mm.files import write_json


def vary(source: Path, number: int, side: int = 112) -> Image.Image:
    """Returns a picture changed a little, by number."""
    rng = np.random.default_rng(number)
    with Image.open(source) as picture:
        whole = picture.convert("RGB")
    sides = [round(length * rng.uniform(0.6, 1.0)) for length in whole.size]
    left, top = (rng.integers(0, a - b + 1) for a, b in zip(whole.size, sides, strict=True))
    box = int(left), int(top), int(left) + sides[0], int(top) + sides[1]
    found = whole.resize((side, side), box=box)
    found = ImageOps.mirror(found) if rng.random() < 0.5 else found
    return ImageEnhance.Brightness(found).enhance(rng.uniform(0.7, 1.3))


def make(pictures: Path, folder: Path, count: int) -> None:
    """Writes so many varied pictures, and a csv of them."""
    sources = sorted(pictures.glob("*.jpg"))
    (folder / "images").mkdir(parents=True)
    names = [f"images/{number:06}.jpg" for number in range(count)]

    def one(number: int) -> None:
        vary(sources[number % len(sources)], number).save(folder / names[number], quality=85)

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, range(count)))
    with open(folder / "captions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "caption"))
        rows.writerows((name, f"picture {number} of many") for number, name in enumerate(names))


def clean(scratch: Path, stop: float | None) -> dict[str, Any]:
    """Cleans, killed after `stop` seconds, and returns how long it took and what was kept."""
    where = (
        f"--config.data.dir={scratch / 'data'}",
        f"--config.data.cache_dir={scratch / 'cache'}",
    )
    command = ["unified_mm.clean", "--config=coco:tiny", *where, f"--out={scratch / 'out'}"]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    try:
        subprocess.run([sys.executable, "-m", *command], check=True, timeout=stop)
    except subprocess.TimeoutExpired:
        print(f"killed after {stop} seconds")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(used.ru_utime - before, 1),
        "gigabytes": round(used.ru_maxrss / 2**20, 2),
        "parts kept": len(list((scratch / "cache" / "looked").glob("*.npz"))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--stop", type=float, default=120.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    make(options.pictures, options.scratch / "data", options.count)
    stopped, whole = clean(options.scratch, options.stop), clean(options.scratch, None)
    manifest = json.loads((options.scratch / "out" / "manifest.json").read_text())
    found = {"pictures": options.count, "dropped": len(manifest["examples"])}
    write_json(options.out, {**found, "stopped": stopped, "ended": whole, **provenance()})
    print(json.dumps({**found, "stopped": stopped, "ended": whole}))


if __name__ == "__main__":
    main()
