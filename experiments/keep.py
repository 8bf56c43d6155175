"""Stores the scores of a run: `python -m experiments.keep runs/first first`.

Writes `experiments/results/NAME.json` (the run's `result.json`, and the scores during training) and
`NAME.svg`, the learning curve. An existing result is replaced only with `--replace`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unified_mm.analysis.figures import as_svg, subplots
from unified_mm.default_config import defaults
from unified_mm.files import read_json, write_atomically, write_json
from unified_mm.runs.folder import RunFolder
from unified_mm.runs.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"
CURVES = {
    "text-to-image R@1": "single_caption/text_to_image/recall_at_1",
    "text-to-image R@10": "single_caption/text_to_image/recall_at_10",
    "caption above its foil": "foil/accuracy",
    "CIDEr-D / 10": "caption/cider_d",
    "class": "classification/accuracy",
    "mean of classes": "classification/mean_per_class",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("name", help="of the result")
    parser.add_argument("--replace", action="store_true", help="overwrite what was kept before")
    args = parser.parse_args()
    target = new_result(args.name, replace=args.replace)
    folder = finished_run(args.run)
    split = folder.read_config(defaults())["evaluation"]["split"]
    curves = scored_along_the_way(folder, split)
    result = read_json(folder.result)
    result["data"]["folder"] = ""  # where it lay is nobody's business
    write_result(target, {**result, "curves": curves}, draw(curves))
    print(json.dumps(result["scores"]))


def new_result(name: str, *, replace: bool) -> Path:
    """Returns the file of a result.

    Raises:
      SystemExit: if it exists and `replace` is false.
    """
    target = RESULTS / f"{name}.json"
    if target.exists() and not replace:
        raise SystemExit(f"{target} exists; --replace overwrites it")
    return target


def finished_run(path: Path) -> RunFolder:
    """Returns the folder of a finished run.

    Raises:
      SystemExit: if it is none.
    """
    folder = RunFolder(path)
    if not folder.finished:
        raise SystemExit(f"{folder.path} is no finished run (it has no result.json)")
    return folder


def write_result(target: Path, content: Mapping[str, Any], drawing: str) -> None:
    """Writes a result, and beside it what is drawn of it, as SVG."""
    write_json(target, content)
    write_atomically(target.with_suffix(".svg"), drawing.encode())
    print(f"kept {target} and {target.with_suffix('.svg')}")


def scored_along_the_way(folder: RunFolder, split: str) -> dict[str, list[list[float]]]:
    """Returns, by label, [step, score] of each evaluation."""
    metrics = read_metrics(folder.metrics)
    curves = {}
    for label, score in CURVES.items():
        if f"{split}/{score}" in metrics:
            steps, values = metrics[f"{split}/{score}"]
            curves[label] = [[int(s), float(v)] for s, v in zip(steps, values, strict=True)]
    return curves


def draw(curves: dict[str, list[list[float]]]) -> str:
    """Draws the curves over training steps, as SVG."""
    figure, (axes,) = subplots(6, 3.2)
    for label, points in curves.items():
        scale = 10 if label.endswith("/ 10") else 1
        axes.plot([s for s, _ in points], [v / scale for _, v in points], marker="o", label=label)
    axes.set_xlabel("training step")
    axes.set_ylim(0, 1)
    axes.legend(fontsize="small")
    return as_svg(figure)


if __name__ == "__main__":
    main()
