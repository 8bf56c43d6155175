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
from unified_mm.evaluation.evaluate import SINGLE

KEY_COUNT = 6
# The scores that say most, the first ones first, and what each is; other modalities may stand for
# the image, and a contrast's own name before its scores.
KEY_SCORES = (
    (r"(?:.*/)?text_to_(\w+)/recall_at_1", r"of texts find their own \1 first"),
    (r"(?:.*/)?text_to_(\w+)/recall_at_10", r"of texts find their own \1 among the first ten"),
    (r"(?:.*/)?(\w+)_to_text/recall_at_1", r"of \1s find a text of theirs first"),
    (r"caption/cider_d", "likeness of captions to those that people wrote, from 0 to 10"),
    (r"foil/(?:\w+/)?accuracy", "of true captions are told from the same with one word made false"),
    (r"answer/accuracy", "of questions are answered as people answer them"),
    (r"caption/image_gain", "nats a token that a caption gains beside its own image"),
    (r"caption/nats", "nats a token that people's captions cost; less is better"),
    (r"(?:.*/)?(\w+)_to_(\w+)/recall_at_1", r"of \1s find their own \2 first"),
)
IN_HEADING = ("source", "counts", "cut_share", "device", "seconds", "steps", "parameters")


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
      operations: those that took longest, where steps were traced; see `training.tracing`.
    """

    title: str
    banner: str | None
    result: Mapping[str, Any]
    config: Mapping[str, Any]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    retrieval: Sequence[RetrievalExample] = ()
    captions: Sequence[CaptionExample] = ()
    rules: Mapping[str, RuleTable] = field(default_factory=dict)
    operations: Sequence[Mapping[str, Any]] = ()


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
        heading=_heading(data.result),
        key_scores=_key_scores(data.result),
        score_groups=_score_groups(data.result),
        facts=_facts(data.result),
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


def _key_scores(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the scores that say most, six at most: of the main split, one caption an image.

    A run of which none is known to say most has its first ones.
    """
    splits = result.get("data", {}).get("counts", {})
    own = [name for name in result["scores"] if name.partition("/")[0] not in splits]
    repeated = {name.replace(SINGLE, "") for name in own if SINGLE in name}
    found: dict[str, str] = {}
    for pattern, meaning in KEY_SCORES:
        for name in own:
            if name not in repeated and (match := re.fullmatch(pattern, name)):
                found.setdefault(name, match.expand(meaning))
    chosen = list(found or dict.fromkeys(result["scores"], ""))[:KEY_COUNT]
    return [
        {**_score(result, name), "name": name.replace(SINGLE, ""), "meaning": found.get(name, "")}
        for name in chosen
    ]


def _score_groups(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of the score table, by the part of the name before the first slash."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name in result["scores"]:
        group, _, short = name.partition("/") if "/" in name else ("", "", name)
        groups.setdefault(group, []).append({**_score(result, name), "name": short})
    return groups


def _score(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a score's value with its chance and ceiling, None where there is none."""
    value = result["scores"][name]
    unscaled = name.endswith(("median_rank", "cider_d", "nats")) or "image_gain" in name
    return {
        "name": name,
        "value": value,
        **{column: result.get(column, {}).get(name) for column in ("chance", "ceiling")},
        "has_bar": not unscaled and value is not None and 0 <= value <= 1,
    }


def _heading(result: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a reader asks first: which data, how many texts were cut, on what, how long.

    Older runs say less of it.
    """
    data = result.get("data", {})
    counts = ", ".join(f"{count:,} {split}" for split, count in data.get("counts", {}).items())
    said = {
        "data": ": ".join(filter(None, (data.get("source"), counts))),
        "texts cut": _formatted("{:.1%}", data.get("cut_share")),
        "device": result.get("device"),
        "time": None if result.get("seconds") is None else format_seconds(result["seconds"]),
        "steps": _formatted("{:,}", result.get("steps")),
        "parameters": _formatted("{:,}", result.get("parameters")),
    }
    return {name: value for name, value in said.items() if value}


def _formatted(pattern: str, value: Any) -> str | None:
    return None if value is None else pattern.format(value)


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    """Returns what result.json says beside the scores and the heading, a line each."""
    facts = {}
    for name, value in result.items():
        if name == "data":
            rest = {part: about for part, about in value.items() if part not in IN_HEADING}
            facts.update({f"data/{part}": _one_line(about) for part, about in rest.items()})
        elif name == "flops" and value is not None:
            facts["FLOPs"] = f"{value:.3g}"
        elif name not in ("scores", "chance", "ceiling", *IN_HEADING):
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
