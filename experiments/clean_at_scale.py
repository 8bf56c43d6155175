"""Measures `unified_mm.clean` on many pictures: time and memory, killed in the middle and again.

    python -m experiments.clean_at_scale PICTURES --scratch=DIR --out=FILE

The pictures are crops of those in the folder PICTURES, brighter or darker, and half of them
mirrored, all in one csv; a tenth is held out by name. The first command is killed where `--stop`
parts of 4,096 pictures were looked at, the second one ends.
"""

import argparse
import json
import math
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
    left, top = (int(rng.integers(0, a - b + 1)) for a, b in zip(whole.size, sides, strict=True))
    found = whole.resize((side, side), box=(left, top, left + sides[0], top + sides[1]))
    found = ImageOps.mirror(found) if rng.random() < 0.5 else found
    return ImageEnhance.Brightness(found).enhance(rng.uniform(0.7, 1.3))


def make(pictures: Path, folder: Path, count: int) -> None:
    """Writes so many varied pictures, and a csv of them."""
    sources = sorted(pictures.glob("*.jpg"))
    (folder / "images").mkdir(parents=True)

    def one(number: int) -> str:
        name = f"images/{number:06}.jpg"
        vary(sources[number % len(sources)], number).save(folder / name, quality=85)
        return f"{name},picture {number} of many\n"

    with ThreadPoolExecutor() as pool:
        rows = "".join(pool.map(one, range(count)))
    (folder / "captions.csv").write_text(f"image,caption\n{rows}")


def clean(scratch: Path, stop: float = math.inf) -> dict[str, Any]:
    """Cleans, killed once so many parts are kept, and returns what it took and what was kept."""
    where = (
        f"--config.data.dir={scratch / 'data'}",
        f"--config.data.cache_dir={scratch / 'cache'}",
    )
    command = ["unified_mm.clean", "--config=coco:tiny", *where, f"--out={scratch / 'out'}"]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    kept = 0
    with subprocess.Popen([sys.executable, "-m", *command]) as process:
        while process.poll() is None:
            kept = len(list((scratch / "cache" / "looked").glob("*.npz")))
            if kept >= stop:
                process.kill()
            time.sleep(0.2)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "code": process.returncode,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(used.ru_utime - before, 1),
        "gigabytes": round(used.ru_maxrss / 2**20, 2),
        "parts kept": kept,
    }


def main() -> None:
    """Makes the pictures, cleans them twice, and writes what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--stop", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    make(options.pictures, options.scratch / "data", options.count)
    stopped = clean(options.scratch, options.stop)
    if stopped["code"] == 0:
        raise SystemExit(f"--stop={options.stop}: it ended before; give fewer parts")
    ended = clean(options.scratch)
    dropped = json.loads((options.scratch / "out" / "manifest.json").read_text())["examples"]
    found = {"pictures": options.count, "dropped": len(dropped), "stopped": stopped, "ended": ended}
    write_json(options.out, {**found, **provenance()})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
