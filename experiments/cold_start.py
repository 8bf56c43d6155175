"""How long is it from a command to its first step, and from `serve` to its first answer?

    python -m experiments.cold_start . ../before --recipes experiments/recipe.py:tiny \
        configs/coco.py:tiny --turns=3 --output=cold.json

Each argument is a checkout of this project, with the recipe of the same shapes that it has. In
turns, each checkout begins a run of the embedded world twice, first with no compiled programs kept,
then with those of the first time, if it keeps any; then it serves the run it wrote, likewise, and
is asked for one caption. Pictures are drawn before anything is timed. Quoted are medians, and
`times_before`: each over the last checkout's without kept programs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from unified_mm.benchmarks.timing import provenance
from unified_mm.files import write_json

STEPS = 3
LIMIT = 600.0  # seconds
FIELDS = (f"--config.train.steps={STEPS}", "--config.logging.every=1")
SMALL = ("--config.evaluation.max_images=4", "--config.logging.tensorboard=False")


def main() -> None:
    """Measures the checkouts in turns and writes the medians."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkouts", type=Path, nargs="+")
    parser.add_argument("--recipes", nargs="+", required=True, help="one for each checkout")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    if len(given.recipes) != len(given.checkouts):
        parser.error("--recipes: give one for each checkout")
    measured: list[dict[str, list[float]]] = [{} for _ in given.checkouts]
    with tempfile.TemporaryDirectory() as work:
        places = [Path(work, str(number)) for number in range(len(given.checkouts))]
        chosen = list(zip(given.checkouts, given.recipes, places, strict=True))
        for checkout, recipe, place in chosen:  # draws the pictures, and trains what is served
            train(checkout, recipe, place, until="")
        for turn in range(given.turns):
            for (checkout, recipe, place), found in zip(chosen, measured, strict=True):
                for name, seconds in one_turn(checkout, recipe, place).items():
                    found.setdefault(name, []).append(seconds)
                print(turn, checkout, {name: round(each[-1], 1) for name, each in found.items()})
    medians = [{name: statistics.median(each) for name, each in one.items()} for one in measured]
    rows = [
        {
            "recipe": recipe,
            "seconds": seconds,
            "median": median,
            "times_before": {
                name: each / medians[-1][name.removesuffix("_kept")]
                for name, each in median.items()
            },
        }
        for recipe, seconds, median in zip(given.recipes, measured, medians, strict=True)
    ]
    write_json(given.output, {"turns": given.turns, "checkouts": rows, **provenance()})


def one_turn(checkout: Path, recipe: str, place: Path) -> dict[str, float]:
    """Returns the seconds of each start, without and with kept programs."""
    found = {}
    for what, start in (("step", begin), ("answer", first_answer)):
        shutil.rmtree(place / "unified_mm" / "programs", ignore_errors=True)
        found[f"first_{what}"] = start(checkout, recipe, place)
        found[f"first_{what}_kept"] = start(checkout, recipe, place)
    return found


def begin(checkout: Path, recipe: str, place: Path) -> float:
    """Returns the seconds to the first step of a new run, which is then stopped."""
    return train(checkout, recipe, place, until="step 1/")


def train(checkout: Path, recipe: str, place: Path, until: str) -> float:
    """Trains a new run until a line that begins so, or to its end; returns the seconds."""
    run = place / ("begun" if until else "run")
    shutil.rmtree(run, ignore_errors=True)
    words = [f"--config={recipe}", f"--workdir={run}", *FIELDS, *SMALL]
    began = time.perf_counter()
    with command(checkout, place, "unified_mm.main", words) as process:
        wait_for(process, until)
        return time.perf_counter() - began


def first_answer(checkout: Path, recipe: str, place: Path) -> float:
    """Returns the seconds from `serve` to the caption of a picture of the world."""
    del recipe
    picture = next(place.rglob("*.png"), None) or next(place.rglob("*.jpg"))
    began = time.perf_counter()
    with command(checkout, place, "unified_mm.serve", [f"--run={place / 'run'}"]) as process:
        address = wait_for(process, "http://127").split()[0].rstrip("/,.")
        form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        asked = urllib.request.Request(
            f"{address}/caption",
            form + picture.read_bytes() + b"\r\n--x--\r\n",
            {"Content-Type": "multipart/form-data; boundary=x"},
        )
        with urllib.request.urlopen(asked, timeout=LIMIT) as answer:
            json.load(answer)
        return time.perf_counter() - began


@contextlib.contextmanager
def command(
    checkout: Path, place: Path, module: str, words: Sequence[str]
) -> Iterator[subprocess.Popen[str]]:
    """Runs a checkout's command with caches of its own, and ends it with all that it began."""
    environment = dict(os.environ, XDG_CACHE_HOME=str(place), PYTHONUNBUFFERED="1")
    for elsewhere in ("UNIFIED_MM_CACHE", "JAX_COMPILATION_CACHE_DIR"):
        environment.pop(elsewhere, None)
    place.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        limit = threading.Timer(LIMIT, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen[str], beginning: str) -> str:
    """Returns a command's first line with these words, from these on; '' waits for its end.

    Raises:
      RuntimeError: it ended otherwise.
    """
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if beginning and beginning in line:
            return line[line.index(beginning) :].strip()
    if process.wait() or beginning:
        raise RuntimeError(f"a command ended by itself:\n{''.join(lines[-20:])}")
    return ""


if __name__ == "__main__":
    main()
