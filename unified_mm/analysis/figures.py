"""SVG drawings of matplotlib figures."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Drawing:
    """An SVG drawing that a notebook shows."""

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg


def subplots(
    width: int | float, height: int | float, rows: int = 1, columns: int = 1, grid: float = 0.3
) -> tuple[Any, list[Any]]:
    """Returns a matplotlib figure and its panels, row by row.

    Args:
      width, height: of the figure in inches.
      rows, columns: of panels.
      grid: opacity of the panels' grid.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    found = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in found if grid else ():
        axes.grid(alpha=grid)
    return figure, found


def as_svg(figure: Any) -> str:
    """Returns a matplotlib figure as SVG; the same figure always gives the same bytes."""
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "unified_mm"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
