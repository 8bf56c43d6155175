"""The report of a run as one self-contained HTML page.

`ReportData` is everything the page shows; `render_report` is a pure function of it.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool

from unified_mm.analysis.pages import (
    Chart,
    Curve,
    Picture,
    format_seconds,
    line_chart,
    render_page,
)


@dataclass(frozen=True)
class RetrievalExample:
    """A query and the pictures found for it.

    Attributes:
      query: the text that was searched for.
      images: the pictures that were found, best first.
      correct: for each picture, whether it is right.
    """

    query: str
    images: Sequence[Picture]
    correct: Sequence[bool]


@dataclass(frozen=True)
class CaptionExample:
    """A picture with the captions of people and of the model.

    Attributes:
      image: the picture [height, width, 3].
      references: what people wrote.
      generated: what the model wrote.
    """

    image: Picture
    references: tuple[str, ...]
    generated: str


@dataclass(frozen=True)
class RuleTable:
    """An attention rule over named tokens.

    Attributes:
      labels: names of the tokens.
      visible: `visible[n, k]` says whether token n may see token k.
    """

    labels: Sequence[str]
    visible: Bool[np.ndarray, "N N"]


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    Attributes:
      title: name of the run.
      banner: a warning, such as that the data is not the user's own; or None.
      result: the contents of result.json; `scores` is required.
      config: the contents of config.json.
      curves: for each metric its steps and values; None or NaN leaves a gap.
      retrieval: example searches.
      captions: example captions.
      rules: the attention rules by name.
    """

    title: str
    banner: str | None
    result: Mapping[str, Any]
    config: Mapping[str, Any]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    retrieval: Sequence[RetrievalExample] = ()
    captions: Sequence[CaptionExample] = ()
    rules: Mapping[str, RuleTable] = field(default_factory=dict)


def render_report(data: ReportData) -> str:
    """Returns the report as one self-contained HTML page; all text in it is escaped.

    Raises:
      KeyError: the result has no `scores`.
      ValueError: the parts of an example or of a rule differ in length.
    """
    _check(data)
    return render_page(
        "report.html.jinja",
        data=data,
        facts=_facts(data.result),
        score_groups=_score_groups(data.result),
        charts=_charts(data.curves),
        config=json.dumps(data.config, indent=2, default=str, ensure_ascii=False),
    )


def _check(data: ReportData) -> None:
    for example in data.retrieval:
        if len(example.images) != len(example.correct):
            raise ValueError(
                f"retrieval example {example.query!r} has {len(example.images)} images and "
                f"{len(example.correct)} marks: give one mark per image."
            )
    for name, rule in data.rules.items():
        if rule.visible.shape != (len(rule.labels), len(rule.labels)):
            raise ValueError(
                f"rule {name!r} has {len(rule.labels)} labels and a table of shape "
                f"{rule.visible.shape}: give one row and one column per label."
            )


def _score_groups(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of the score table, by the part of the name before the first slash."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, value in result["scores"].items():
        group, _, short = name.partition("/") if "/" in name else ("", "", name)
        row = {"name": short, "value": value}
        for column in ("chance", "ceiling"):
            row[column] = result.get(column, {}).get(name)
        unscaled = short.endswith(("median_rank", "cider_d", "nats")) or "image_gain" in short
        row["has_bar"] = not unscaled and value is not None and 0 <= value <= 1
        groups.setdefault(group, []).append(row)
    return groups


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    """Returns the rest of result.json, a line each: what was run, on what and with which data."""
    facts = {}
    for name, value in result.items():
        if name == "data":
            facts.update({f"data/{part}": _one_line(about) for part, about in value.items()})
        elif name == "seconds" and value is not None:
            facts["time"] = format_seconds(value)
        elif name == "flops" and value is not None:
            facts["FLOPs"] = f"{value:.3g}"
        elif name not in ("scores", "chance", "ceiling"):
            facts[name] = _one_line(value)
    return facts


def _one_line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_one_line(part)}" for name, part in value.items())
    return "\u2013" if value is None else str(value)


def _charts(curves: Mapping[str, Curve]) -> list[Chart]:
    """Returns one chart for each quantity, with a line for each metric that measures it."""
    by_quantity: defaultdict[str, dict[str, Curve]] = defaultdict(dict)
    for name in sorted(curves, key=_chart_order):
        by_quantity[_quantity(name)][name] = curves[name]
    return [
        line_chart(quantity if len(lines) > 1 else next(iter(lines)), lines)
        for quantity, lines in by_quantity.items()
    ]


def _quantity(name: str) -> str:
    """Returns what a metric measures: `a/loss` and `loss` are losses, recalls belong together."""
    return re.sub(r"(_at)?_\d+$", "", name.rpartition("/")[2])


def _chart_order(name: str) -> tuple[int, str]:
    """Returns a sort key: losses, then scores, the learning rate, the rest, and times last."""
    order = ("loss", "accuracy", "recall", "rank", "learning_rate")
    if name.startswith("time/"):
        return len(order) + 1, name
    return next((i for i, word in enumerate(order) if word in name), len(order)), name
