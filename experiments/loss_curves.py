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

from experiments.keep import finished_run, new_result, write_result
from unified_mm.analysis.figures import as_svg, subplots
from unified_mm.files import read_json
from unified_mm.runs.folder import RunFolder
from unified_mm.runs.metrics import read_metrics

Curve = list[list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the result")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, the first to compare with")
    parser.add_argument("--replace", action="store_true", help="overwrite what was kept before")
    args = parser.parse_args()
    target = new_result(args.name, replace=args.replace)
    folders = {path.name: finished_run(path) for path in args.runs}
    curves = {name: losses(folder) for name, folder in folders.items()}
    results = {name: read_json(folder.result) for name, folder in folders.items()}
    first = next(iter(curves))
    kept = {
        "curves": curves,
        "compared_with": first,
        "mean_difference": {name: distance(curve, curves[first]) for name, curve in curves.items()},
        "scores": {name: result["scores"] for name, result in results.items()},
        **{key: results[first][key] for key in ("device", "versions", "revision", "seed")},
    }
    write_result(target, kept, draw(curves))
    print(json.dumps(kept["mean_difference"]))


def losses(folder: RunFolder) -> Curve:
    """Returns [step, loss] of each logged interval of a finished run."""
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
    figure, (loss, apart) = subplots(8, 3.2, columns=2)
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
    return as_svg(figure)


if __name__ == "__main__":
    main()
