"""Small results of single runs, stored as VARIANT-SEED.json in one folder for each ablation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import RECIPE
from experiments.sweeping.runs import ROOT, Run, make_run
from unified_mm.files import read_json, write_json
from unified_mm.runs.folder import RunFolder
from unified_mm.runs.metrics import read_metrics

RESULTS = Path(__file__).parents[1] / "results"
POINTS = 40  # of a learning curve
FORMER = "configs/coco.py"  # what the recipe of the ablations was called
# Where data lies is nobody's business.
PLACES = re.compile(r"data\.(dir|cache_dir|mixture\.[^=]+\.dir)=")
DATA = ("data.dir", "data.manifest")  # by which variants may be of different data
# What is kept of result.json as it is.
SAME = ("device", "versions", "revision", "steps", "seconds", "flops")

MEND = "carry the sweep out and report again, or delete it"


@dataclass(frozen=True)
class Result:
    """The result of one run.

    Attributes:
      path: the path of the file.
      variant: the variant of the ablation.
      seed: the seed of the run.
      config: the recipe.
      fields: the fields that were set in it, without those that say where data is stored.
      data: the fingerprint of the data that was scored.
      flops: FLOPs of the whole training: matrix products and convolutions.
      parameters: the number of parameters; None if the run did not record it.
      scores: scores by name.
      chance: the scores of guessing, by name.
      curves: by metric, [step, value] of means over equal stretches of training.
    """

    path: Path
    variant: str
    seed: int
    config: str
    fields: tuple[str, ...]
    data: str
    flops: float
    parameters: int | None
    scores: dict[str, float]
    chance: dict[str, float]
    curves: dict[str, list[list[float]]]


def keep(run: Run, scores: Sequence[str], folder: Path) -> Path:
    """Writes a finished run's result into `folder`; the same run gives the same file."""
    found = run.folder.read_result()
    counts = {"parameters": found["parameters"]} if "parameters" in found else {}
    data = {key: value for key, value in found["data"].items() if key not in ("folder", "notice")}
    own = {
        name: value
        for name, value in found["scores"].items()
        if name in scores or not name.startswith("test_")
    }
    kept = {
        "variant": run.variant,
        "seed": run.seed,
        "config": run.config.removeprefix(f"{ROOT}/"),
        "fields": fields_of(run),
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


def fields_of(run: Run) -> list[str]:
    """Returns the fields that the run sets, as FIELD=VALUE."""
    given = (each.removeprefix("--config.") for each in run.fields)
    return [each for each in given if not PLACES.match(each)]


def read_kept(folder: Path, ablation: Ablation) -> list[Result]:
    """Returns all results of a folder, by name.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if a result lacks a field, belongs to no variant of the ablation, was trained with
        another config than the ablation has now, or is of other data than another one of the same
        `DATA`; the message names the file.
    """
    paths = sorted(folder.glob("*-*.json"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no VARIANT-SEED.json")
    results = [read_result(path) for path in paths]
    variants = ablation.all_variants()
    firsts: dict[tuple[Any, ...], Result] = {}  # by the data that their variants name
    for result in results:
        if result.path.stem != f"{result.variant}-{result.seed}":
            raise ValueError(f"{result.path} holds {result.variant}-{result.seed}; {MEND}")
        if result.variant not in variants:
            raise ValueError(
                f"{result.path}: the ablation has no variant {result.variant!r} "
                f"({', '.join(variants)}); delete it, or give --name"
            )
        fields = variants[result.variant]
        asked = make_run(result.variant, result.seed, fields, ablation.config, folder)
        named = tuple(fields.get(name) for name in DATA)
        check_same(result, asked, firsts.setdefault(named, result))
    return results


def check_same(result: Result, asked: Run, first: Result) -> None:
    """Raises ValueError if a result has another config than asked, or other data than the first."""
    fields = tuple(fields_of(asked))
    config = asked.config.removeprefix(f"{ROOT}/")
    if result.config not in (config, config.replace(RECIPE, FORMER)):
        raise ValueError(f"{result.path} is of {result.config}, not of {asked.config}; {MEND}")
    if result.fields[: len(fields)] != fields:
        changed = sorted(set(result.fields) ^ set(fields))
        raise ValueError(f"{result.path} was trained otherwise ({', '.join(changed[:4])}); {MEND}")
    if result.data != first.data:
        raise ValueError(f"{result.path} is of other data than {first.path}; {MEND}")


def read_result(path: Path) -> Result:
    """Reads one stored result.

    Raises:
      ValueError: if the file is no stored result.
    """
    kept: Any = read_json(path)
    try:
        return Result(
            path=path,
            variant=kept["variant"],
            seed=kept["seed"],
            config=kept["config"],
            fields=tuple(kept["fields"]),
            data=kept["data"]["fingerprint"],
            flops=float(kept["flops"]),
            parameters=kept.get("parameters"),
            scores={name: float(value) for name, value in kept["scores"].items()},
            chance={name: float(value) for name, value in kept["chance"].items()},
            curves={name: [[*point] for point in curve] for name, curve in kept["curves"].items()},
        )
    except KeyError as error:
        raise ValueError(f"{path} is no kept result: it has no {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no kept result: {error}") from error


def curves_of(folder: RunFolder) -> dict[str, list[list[float]]]:
    """Returns the learning curves of a run, averaged down to at most `POINTS` points."""
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
