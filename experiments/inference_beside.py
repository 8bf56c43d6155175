"""Do embeddings and captions take longer than in another checkout of this project?

    python -m experiments.inference_beside ../before --runs runs/early runs/flamingo \
        --pictures=FOLDER --turns=25 --output=inference.json

A process of this checkout and one of the other load each run, which both must be able to, embed 32
of the pictures, and caption 32 together and eight one at a time, in turns on the same cores. The
captions must be the same. Quoted are medians of the turns: seconds, CPU seconds of all threads, and
how many times the other checkout's this one's are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

PICTURES, ALONE = 32, 8
WORKER = "--worker"


def main() -> None:
    """Measures the runs and writes what came out."""
    from unified_mm.benchmarks.timing import provenance
    from unified_mm.files import write_json

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--pictures", type=Path, required=True, help="a folder of pictures")
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    rows = []
    for run in given.runs:
        rows.append({"run": run.name, **beside(given.other, run, given.pictures, given.turns)})
        print(json.dumps(rows[-1]))
    write_json(given.output, {"turns": given.turns, "runs": rows, **provenance()})


def beside(other: Path, run: Path, pictures: Path, turns: int) -> dict[str, Any]:
    """Returns each work's medians in both checkouts, and their ratio.

    Raises:
      RuntimeError: a process ended by itself, or the captions differ.
    """
    checkouts = {"this": Path(__file__).parents[1], "other": other}
    workers = {}
    with ExitStack() as stack:
        for name, place in checkouts.items():
            workers[name] = stack.enter_context(begin(place, run, pictures))
            stack.callback(workers[name].kill)
        ready = {name: told(worker) for name, worker in workers.items()}
        if ready["this"] != ready["other"]:
            raise RuntimeError(f"{run}: the checkouts write other captions: {ready}")
        return {work: in_turns(workers, work, turns) for work in WORKS}


def begin(checkout: Path, run: Path, pictures: Path) -> subprocess.Popen[str]:
    """Starts the process of a checkout."""
    return subprocess.Popen(
        [sys.executable, __file__, WORKER, str(run.resolve()), str(pictures.resolve())],
        cwd=checkout,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def told(worker: subprocess.Popen[str], work: str = "") -> Any:
    """Returns what a process answers, after it was asked for a work if one is named.

    Raises:
      RuntimeError: it ended by itself.
    """
    assert worker.stdin is not None and worker.stdout is not None
    if work:
        print(work, file=worker.stdin, flush=True)
    if not (line := worker.stdout.readline()):
        raise RuntimeError("a process ended by itself; what it said stands above")
    return json.loads(line)


def in_turns(
    workers: dict[str, subprocess.Popen[str]], work: str, turns: int
) -> dict[str, dict[str, float]]:
    """Returns the medians of a work in both, who begin by turns."""
    taken: dict[str, list[list[float]]] = {name: [] for name in workers}
    for turn in range(turns):
        for name in sorted(workers, reverse=bool(turn % 2)):
            taken[name].append(told(workers[name], work))
    found = {}
    for place, unit in enumerate(("seconds", "cpu_seconds")):
        medians = {name: statistics.median(each[place] for each in taken[name]) for name in taken}
        times = medians["this"] / medians["other"]
        found[unit] = {name: round(each, 5) for name, each in medians.items()}
        found[unit]["times_other"] = round(times, 3)
    return found


def embed(model: Any, pictures: list[Any]) -> None:
    """Embeds the pictures."""
    model.embed_images(pictures)


def caption_together(model: Any, pictures: list[Any]) -> list[str]:
    """Captions the pictures in one call."""
    return [str(text) for text in model.caption(pictures)]


def caption_alone(model: Any, pictures: list[Any]) -> None:
    """Captions some of the pictures, one a call."""
    for picture in pictures[:ALONE]:
        model.caption([picture])


WORKS = {"embed_32": embed, "captions_32": caption_together, "captions_1": caption_alone}


def serve(run: str, folder: str) -> None:
    """Loads a run with the checkout that this process stands in, and works as it is asked to.

    Raises:
      SystemExit: there is no checkout, or there are too few pictures.
    """
    sys.path.insert(0, os.getcwd())
    from PIL import Image

    import unified_mm

    if Path.cwd() not in Path(str(unified_mm.__file__)).resolve().parents:
        raise SystemExit(f"{Path.cwd()} is no checkout: {unified_mm.__file__} would be measured")
    model = unified_mm.load(run)
    files = sorted(Path(folder).glob("*.jpg"))[:PICTURES]
    if len(files) < PICTURES:
        raise SystemExit(f"{folder} has {len(files)} files *.jpg: {PICTURES} are needed")
    pictures = [Image.open(file).convert("RGB") for file in files]
    for work in WORKS.values():
        work(model, pictures)  # compiles
        work(model, pictures)
    print(json.dumps(caption_together(model, pictures)), flush=True)
    for line in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        WORKS[line.strip()](model, pictures)
        print(json.dumps([time.perf_counter() - began, time.process_time() - cpu]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        serve(*sys.argv[2:])
    else:
        main()
