"""Training losses of several runs side by side: `python -m experiments.loss_curves NAME RUN ...`.

Writes `experiments/results/NAME.json` (for each run: [step, loss], and the mean difference from the
first run over the second half) and `NAME.svg`. An existing result is replaced only with
`--replace`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from experiments.keep import RESULTS
from unified_mm.analysis.figures import as_svg
from unified_mm.files import read_json, write_atomically, write_json
from unified_mm.runs.folder import RunFolder
from unified_mm.runs.metrics import read_metrics

Curve = list[list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the result")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, the first to compare with")
    parser.add_argument("--replace", action="store_true", help="overwrite what was kept before")
    args = parser.parse_args()
    target = RESULTS / f"{args.name}.json"
    if target.exists() and not args.replace:
        raise SystemExit(f"{target} exists; --replace overwrites it")
    curves = {path.name: losses(RunFolder(path)) for path in args.runs}
    first = next(iter(curves))
    kept = {
        "curves": curves,
        "compared_with": first,
        "mean_difference": {name: distance(curve, curves[first]) for name, curve in curves.items()},
        "scores": {path.name: read_json(RunFolder(path).result)["scores"] for path in args.runs},
        **{
            key: read_json(RunFolder(args.runs[0]).result)[key]
            for key in ("device", "versions", "revision", "seed")
        },
    }
    write_json(target, kept)
    write_atomically(target.with_suffix(".svg"), draw(curves).encode())
    print(f"kept {target} and {target.with_suffix('.svg')}")
    print(json.dumps(kept["mean_difference"]))


def losses(folder: RunFolder) -> Curve:
    """Returns [step, loss] of each logged interval of a finished run.

    Raises:
      SystemExit: if the run is not finished.
    """
    if not folder.finished:
        raise SystemExit(f"{folder.path} is no finished run (it has no result.json)")
    steps, values = read_metrics(folder.metrics)["loss"]
    return [[int(s), float(v)] for s, v in zip(steps, values, strict=True)]


def distance(curve: Curve, other: Curve) -> float:
    """Returns the mean of curve - other over the second half of the steps that both have."""
    here, there = by_step(curve), by_step(other)
    both = sorted(here.keys() & there.keys())
    return float(np.mean([here[step] - there[step] for step in both[len(both) // 2 :]]))


def by_step(curve: Curve) -> dict[int, float]:
    """Returns the loss by step."""
    return {int(step): loss for step, loss in curve}


def draw(curves: dict[str, Curve]) -> str:
    """Draws the losses, and their differences from the first run's, over training steps, as SVG."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 3.2), layout="constrained")
    loss, apart = figure.subplots(1, 2)
    first = by_step(next(iter(curves.values())))
    for name, curve in curves.items():
        steps = [step for step in by_step(curve) if step in first]
        values = by_step(curve)
        loss.plot(steps, [values[step] for step in steps], label=name, linewidth=1)
        apart.plot(steps, [values[step] - first[step] for step in steps], linewidth=1)
    loss.set_ylabel("loss")
    apart.set_ylabel(f"loss less that of {next(iter(curves))}")
    loss.legend(fontsize="small")
    for axes in (loss, apart):
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
    return as_svg(figure)


if __name__ == "__main__":
    main()
