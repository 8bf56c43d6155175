"""Small results of single runs, as they are kept: VARIANT-SEED.json in a folder an ablation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.sweeping.runs import Run
from unified_mm.runs.folder import RunFolder, read_json, write_json
from unified_mm.runs.metrics import read_metrics

RESULTS = Path(__file__).parents[1] / "results"
POINTS = 40  # of a learning curve
PLACES = ("data.dir=", "data.cache_dir=")  # where data lies is nobody's business
# What is kept of result.json as it is.
SAME = ("device", "versions", "revision", "steps", "seconds", "flops")


@dataclass(frozen=True)
class Result:
    """What one run scored.

    Attributes:
      flops: of the matrix products of the whole training.
      parameters: of the model; None where the run did not say.
      scores, chance: by name.
      curves: metric -> [step, value] of means over equal stretches of training.
    """

    variant: str
    seed: int
    flops: float
    parameters: int | None
    scores: dict[str, float]
    chance: dict[str, float]
    curves: dict[str, list[list[float]]]


def keep(run: Run, scores: Sequence[str], folder: Path) -> Path:
    """Writes a finished run's result into `folder`; the same run gives the same file."""
    found = read_json(run.folder.result)
    given = [each.removeprefix("--config.") for each in run.fields]
    counts = {"parameters": found["parameters"]} if "parameters" in found else {}
    data = {key: value for key, value in found["data"].items() if key not in ("folder", "notice")}
    own = {name: value for name, value in found["scores"].items() if not name.startswith("test_")}
    kept = {
        "variant": run.variant,
        "seed": run.seed,
        "fields": [name for name in given if not name.startswith(PLACES)],
        "scores": own,
        "chance": {name: found["chance"][name] for name in scores if name in found["chance"]},
        **{key: found[key] for key in SAME},
        **counts,
        "data": data,
        "curves": curves_of(run.folder),
    }
    target = folder / f"{run.name}.json"
    write_json(target, kept)
    return target


def read_kept(folder: Path) -> list[Result]:
    """All results of a folder, by seed and name.

    Raises:
      FileNotFoundError: there is none.
      ValueError: naming the file, where one lacks something.
    """
    paths = sorted(folder.glob("*-*.json"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no VARIANT-SEED.json")
    return [read_result(path) for path in paths]


def read_result(path: Path) -> Result:
    """One kept file."""
    kept: dict[str, Any] = read_json(path)
    try:
        return Result(
            variant=kept["variant"],
            seed=kept["seed"],
            flops=kept["flops"],
            parameters=kept.get("parameters"),
            scores=kept["scores"],
            chance=kept["chance"],
            curves=kept["curves"],
        )
    except KeyError as error:
        raise ValueError(f"{path} is no kept result: it has no {error}") from error


def curves_of(folder: RunFolder) -> dict[str, list[list[float]]]:
    """Learning curves, thinned to `POINTS` means."""
    metrics = read_metrics(folder.metrics)
    found = {}
    for name, (steps, values) in metrics.items():
        if name != "loss" and not name.endswith("/loss"):
            continue
        stretch = max(1, -(-len(steps) // POINTS))
        found[name] = [
            [int(steps[: start + stretch][-1]), round(float(part.mean()), 5)]
            for start in range(0, len(steps), stretch)
            if (part := values[start : start + stretch]).size
        ]
    return found
