"""Comparison of runs: what differs in their configs, what they cost, and what they score.

The other runs are compared with the first. What a run does not have (an unfinished one its
scores, an imported one its learning curves) is missing in its column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unified_mm.analysis.pages import Chart, Curve, format_score, line_chart
from unified_mm.default_config import defaults
from unified_mm.runs.folder import RunFolder, differences
from unified_mm.runs.metrics import read_metrics

# What is drawn of the metrics: losses and what is scored while training goes on.
DRAWN = ("loss", "accuracy", "recall", "cider_d")
Number = int | float  # as JSON has them
MISSING = "\u2013"


@dataclass(frozen=True)
class RunSummary:
    """A summary of one run.

    Attributes:
      name: name of its folder, or its path where names are alike.
      state: how far it came, in words.
      config: the contents of config.json.
      cost: numbers by name, None where unknown.
      scores: scores by their fixed names; empty where the run has not been scored.
      chance: chance levels, by the same names.
      curves: steps and values of each metric.
      data: the data of the scores, from result.json.
    """

    name: str
    state: str
    config: Mapping[str, Any]
    cost: Mapping[str, Number | None]
    scores: Mapping[str, Number] = field(default_factory=dict)
    chance: Mapping[str, Number] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The fusion, and whether the weights are imported or quantised."""
        parts = [str(self.config.get("model", {}).get("fusion", "?"))]
        if "imported" in self.config:
            parts.append(f"imported {self.config['imported'].get('family', '')}".strip())
        if "quantized" in self.config:
            activations = self.config["quantized"].get("activations")
            parts.append("int8 weights" + " and activations" * bool(activations))
        return ", ".join(parts)


@dataclass(frozen=True)
class Row:
    """A row of a table: a name, and one cell for each run."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """The tables and charts of several runs.

    Attributes:
      names: names of the runs, in order.
      notes: warnings, such as that scores are not comparable.
      facts, config, cost, scores: the tables.
      charts: learning curves.
    """

    names: tuple[str, ...]
    notes: tuple[str, ...]
    facts: tuple[Row, ...]
    config: tuple[Row, ...]
    cost: tuple[Row, ...]
    scores: tuple[Row, ...]
    charts: tuple[Chart, ...]


def summarise(folder: RunFolder, name: str, sizes: Mapping[str, int | None]) -> RunSummary:
    """Reads the summary of a run from its folder.

    Args:
      folder: the run's folder.
      name: what the run is called.
      sizes: parameters and FLOPs of its model, by name; see `unified_mm.training.sizes`.

    Raises:
      FileNotFoundError: there is no run.
      RunFolderError, ValueError: the config, the result or the metrics are damaged.
    """
    if not folder.exists:
        raise FileNotFoundError(f"{folder.path} is no run (it has no config.json)")
    config = folder.read_config(defaults())
    result = folder.read_result() if folder.finished else {}
    curves = read_metrics(folder.metrics) if folder.metrics.is_file() else {}
    return RunSummary(
        name=name,
        state=_state(config, result, curves),
        config=config,
        cost={
            **sizes,
            "FLOPs of training": result.get("flops"),
            "seconds": result.get("seconds"),
        },
        scores=result.get("scores", {}),
        chance=result.get("chance", {}),
        curves={metric: curve for metric, curve in curves.items() if len(curve[0]) > 1},
        data=result.get("data", {}),
    )


def _state(config: Mapping[str, Any], result: Mapping[str, Any], curves: Mapping[str, Any]) -> str:
    if result:
        steps = result.get("steps")
        return "finished" if steps is None else f"finished, {steps:,} steps"
    if "imported" in config:
        return "imported, not scored"
    last = max((int(steps[-1]) for steps, _ in curves.values()), default=0)
    planned = config.get("train", {}).get("steps")
    return f"unfinished, step {last:,}" + (f" of {planned:,}" if planned else "")


def short_names(folders: Sequence[RunFolder]) -> tuple[str, ...]:
    """Returns the name of each run's folder, or its whole path where two names are alike."""
    names = [folder.path.name for folder in folders]
    return tuple(
        name if names.count(name) == 1 else str(folder.path)
        for name, folder in zip(names, folders, strict=True)
    )


def compare(runs: Sequence[RunSummary]) -> Comparison:
    """Returns the tables and charts of runs, which are compared with the first.

    Raises:
      ValueError: there are fewer than two runs, or two of one name.
    """
    names = tuple(run.name for run in runs)
    if len(runs) < 2:
        raise ValueError("give two runs or more to compare")
    if len(set(names)) < len(names):
        raise ValueError(f"a run is given twice: {', '.join(names)}")
    return Comparison(
        names=names,
        notes=notes(runs),
        facts=(
            Row("kind", tuple(run.kind for run in runs)),
            Row("state", tuple(run.state for run in runs)),
            Row("data", tuple(str(run.data.get("source", MISSING)) for run in runs)),
        ),
        config=config_rows(runs),
        cost=number_rows([run.cost for run in runs], _number, _ratio),
        scores=number_rows([run.scores for run in runs], _score, _difference),
        charts=curve_charts(runs),
    )


def notes(runs: Sequence[RunSummary]) -> tuple[str, ...]:
    """Returns warnings: the banners of the data, and why scores may not be comparable."""
    banners = (run.data.get("notice") for run in runs)
    found = list(dict.fromkeys(str(banner) for banner in banners if banner))
    bare = [run.name for run in runs if not run.scores]
    if bare:
        found.append(f"without scores: {', '.join(bare)}")
    prints = {run.data["fingerprint"] for run in runs if "fingerprint" in run.data}
    if len(prints) > 1:
        found.append("trained on different data: their fingerprints differ")
    scored = [run.config.get("evaluation", {}) for run in runs if run.scores]
    for name in ("split", "max_images"):
        values = {str(options.get(name)) for options in scored}
        if len(values) > 1:
            found.append(f"scored otherwise: evaluation.{name} is {', '.join(sorted(values))}")
    return tuple(found)


def config_rows(runs: Sequence[RunSummary]) -> tuple[Row, ...]:
    """Returns the fields in which the configs differ, by dotted name."""
    first = runs[0].config
    found = [
        {each.field: each for each in differences(first, run.config, free=())} for run in runs[1:]
    ]
    rows = []
    for name in sorted({name for each in found for name in each}):
        own = next(each[name].run for each in found if name in each)
        others = (each[name].asked if name in each else own for each in found)
        rows.append(Row(name, (own, *others)))
    return tuple(rows)


def number_rows(
    columns: Sequence[Mapping[str, Number | None]],
    shown: Callable[[Number | None], str],
    beside: Callable[[Number, Number], str],
) -> tuple[Row, ...]:
    """Returns a row for each number that a run has.

    Args:
      columns: the numbers of each run, by name.
      shown: formats a number.
      beside: says how a number compares with the first run's, where there are both.
    """
    first = columns[0]

    def cell(column: Mapping[str, Number | None], name: str) -> str:
        value, base = column.get(name), first.get(name)
        known = column is not first and value is not None and base is not None
        return shown(value) + (beside(value, base) if known else "")  # type: ignore[arg-type]

    return tuple(
        Row(name, tuple(cell(column, name) for column in columns)) for name in _in_order(columns)
    )


def _ratio(value: Number, base: Number) -> str:
    return f" (x {value / base:.2f})" if base else ""


def _difference(value: Number, base: Number) -> str:
    return f" ({value - base:+.3f})"


def curve_charts(runs: Sequence[RunSummary]) -> tuple[Chart, ...]:
    """Returns a chart for each loss and score over training, a line for each run that has it."""
    drawn = [
        name
        for name in _in_order([run.curves for run in runs])
        if name.rpartition("/")[2].startswith(DRAWN)
    ]
    # A run's colour is the same in every chart, whichever runs have a line there.
    return tuple(
        line_chart(name, {run.name: run.curves.get(name) for run in runs})
        for name in sorted(drawn, key=lambda name: ("loss" not in name, name.count("/")))
    )


def _in_order(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of all columns, in the order of their first occurrence."""
    return list(dict.fromkeys(name for column in columns for name in column))


def _number(value: Number | None) -> str:
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value < 1e9 else f"{value:.3g}"


def _score(value: Number | None) -> str:
    return MISSING if value is None else format_score(value)
