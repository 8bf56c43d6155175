"""Shared parts of the HTML pages: templates, number formats, line charts.

A page is self-contained, and all text in it is escaped.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from jaxtyping import UInt8

Picture = UInt8[np.ndarray, "_ _ 3"]
Numbers = Sequence[int | float | None] | np.ndarray
Curve = tuple[Numbers, Numbers]  # steps, values

# Okabe and Ito's colours: told apart by colour-blind readers, on white and on black.
LINE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_NAMES = {
    "cider_d": "CIDEr-D",
    **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
    "rouge_l": "ROUGE-L",
}
_INK = "#010203"  # stands for the page's own text colour until the drawing is done


@dataclass(frozen=True)
class Chart:
    """An inline SVG drawing, with the colour and the name of each line."""

    title: str
    svg: str
    legend: tuple[tuple[str, str], ...]  # empty where one line needs none


def render_page(template: str, **shown: Any) -> str:
    """Renders a template that lies beside this file; a missing variable is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unified_mm.analysis", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(png=_png_url, words=words, score=format_score)
    return environment.get_template(template).render(**shown)


def line_chart(title: str, lines: Mapping[str, Curve | None]) -> Chart:
    """Returns a chart with a line for each curve, and a legend where there are several names.

    A name without a curve (None) keeps its colour, so that all charts of some names are alike.
    """
    drawn = {
        (colour, name): curve
        for colour, (name, curve) in zip(cycle(LINE_COLOURS), lines.items())
        if curve is not None
    }
    legend = tuple(drawn) if len(lines) > 1 else ()
    return Chart(words(title), _draw_lines(drawn.values(), [colour for colour, _ in drawn]), legend)


def _draw_lines(lines: Iterable[Curve], colours: Sequence[str]) -> str:
    """Returns lines over steps as inline SVG; its only text is the numbers at the axes."""
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
    """Returns a picture as a data URL that an HTML `img` can show."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def words(name: str) -> str:
    """Returns a metric's name as a person reads it."""
    parts = (_NAMES.get(part, part.replace("_", " ")) for part in name.split("/"))
    return " \u203a ".join(parts)


def format_score(value: float | None) -> str:
    """Formats a score: three decimals below ten, one above.

    Whole numbers above 1 get no decimals; None becomes a dash.
    """
    if value is None or not math.isfinite(value):
        return "\u2013" if value is None else str(value)
    if value > 1 and value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.3f}" if value < 10 else f"{value:,.1f}"


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"
