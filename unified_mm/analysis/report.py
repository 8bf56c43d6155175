"""The report of a run: one HTML page that needs nothing beside itself.

`ReportData` is everything the page shows; `render_report` is a pure function of it.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

Picture = UInt8[np.ndarray, "_ _ 3"]
Numbers = Sequence[int | float | None] | np.ndarray
Curve = tuple[Numbers, Numbers]  # steps, values

# Okabe and Ito's colours: told apart by colour-blind readers, on white and on black.
_LINE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_NAMES = {
    "cider_d": "CIDEr-D",
    **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
    "rouge_l": "ROUGE-L",
}
_INK = "#010203"  # stands for the page's own text colour until the drawing is done


@dataclass(frozen=True)
class RetrievalExample:
    """A query and the pictures found for it, best first; ``correct`` marks the right ones."""

    query: str
    images: Sequence[Picture]
    correct: Sequence[bool]


@dataclass(frozen=True)
class CaptionExample:
    """A picture [h, w, 3] with what people wrote about it and what the model wrote."""

    image: Picture
    references: tuple[str, ...]
    generated: str


@dataclass(frozen=True)
class RuleTable:
    """An attention rule over named tokens: row n may see column k where ``visible[n, k]``."""

    labels: Sequence[str]
    visible: Bool[np.ndarray, "N N"]


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows.

    Attributes:
      title: name of the run.
      banner: what nobody may overlook, such as data that is not the user's own; or None.
      result: the contents of result.json; ``scores`` is required.
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


@dataclass(frozen=True)
class _Chart:
    title: str
    svg: str
    legend: tuple[tuple[str, str], ...]  # (colour, name); empty where one line needs none


def render_report(data: ReportData) -> str:
    """The report as one self-contained HTML page; all text in it is escaped.

    Raises:
      KeyError: the result holds no ``scores``.
      ValueError: an example or a rule whose parts differ in length.
    """
    import jinja2

    _check(data)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(png=_png_url, words=_words, score=_format_score)
    template = resources.files(__package__).joinpath("report.html.jinja")
    return environment.from_string(template.read_text(encoding="utf-8")).render(
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
    """Rows of the score table by the part of the name before the first slash."""
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
    """What was run, on what and with which data: the rest of result.json, a line each."""
    facts = {}
    for name, value in result.items():
        if name == "data":
            facts.update({f"data/{part}": _one_line(about) for part, about in value.items()})
        elif name == "seconds" and value is not None:
            facts["time"] = _format_seconds(value)
        elif name == "flops" and value is not None:
            facts["FLOPs"] = f"{value:.3g}"
        elif name not in ("scores", "chance", "ceiling"):
            facts[name] = _one_line(value)
    return facts


def _one_line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_one_line(part)}" for name, part in value.items())
    return "\u2013" if value is None else str(value)


def _charts(curves: Mapping[str, Curve]) -> list[_Chart]:
    """One chart for each quantity, holding a line for each metric that measures it."""
    by_quantity: defaultdict[str, dict[str, Curve]] = defaultdict(dict)
    for name in sorted(curves, key=_chart_order):
        by_quantity[_quantity(name)][name] = curves[name]
    return [_chart(quantity, lines) for quantity, lines in by_quantity.items()]


def _quantity(name: str) -> str:
    """What a metric measures: ``a/loss`` and ``loss`` are losses, recalls belong together."""
    return re.sub(r"(_at)?_\d+$", "", name.rpartition("/")[2])


def _chart_order(name: str) -> tuple[int, str]:
    """Losses first, then scores, the learning rate, the rest, and the clock last."""
    order = ("loss", "accuracy", "recall", "rank", "learning_rate")
    if name.startswith("time/"):
        return len(order) + 1, name
    return next((i for i, word in enumerate(order) if word in name), len(order)), name


def _chart(quantity: str, lines: Mapping[str, Curve]) -> _Chart:
    colours = [_LINE_COLOURS[i % len(_LINE_COLOURS)] for i in range(len(lines))]
    legend = tuple(zip(colours, lines, strict=True)) if len(lines) > 1 else ()
    only_name = next(iter(lines))
    return _Chart(
        title=_words(quantity if legend else only_name),
        svg=_draw(list(lines.values()), colours),
        legend=legend,
    )


def _draw(lines: Sequence[Curve], colours: Sequence[str]) -> str:
    """Inline SVG of lines over steps; its only text is the numbers at the axes."""
    import markupsafe
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "text.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4, 2.2), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for (steps, values), colour in zip(lines, colours, strict=True):
            heights = np.array(values, dtype=np.float64)  # None becomes NaN, which leaves a gap
            dot = "o" if np.isfinite(heights).sum() < 12 else None
            axes.plot(
                np.array(steps), heights, color=colour, linewidth=1.5, marker=dot, markersize=3
            )
        axes.grid(alpha=0.15, color=_INK)
        axes.margins(x=0.02)
        page = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.print_svg(page, metadata=nothing)
    drawing = page.getvalue()
    return markupsafe.Markup(drawing[drawing.index("<svg") :].replace(_INK, "currentColor").strip())


def _png_url(image: Picture) -> str:
    """A picture as a data URL that an ``img`` can show."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _words(name: str) -> str:
    """A metric's name as a person reads it."""
    parts = (_NAMES.get(part, part.replace("_", " ")) for part in name.split("/"))
    return " \u203a ".join(parts)


def _format_score(value: float | None) -> str:
    """Three decimals below ten, one above; whole numbers without; a dash for nothing."""
    if value is None or not math.isfinite(value):
        return "\u2013" if value is None else str(value)
    if value > 1 and value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.3f}" if value < 10 else f"{value:,.1f}"


def _format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"
