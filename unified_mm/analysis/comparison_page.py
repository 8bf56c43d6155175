"""Output of a comparison of runs: tables for a terminal, and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from unified_mm.analysis.comparison import Comparison, Row
from unified_mm.analysis.pages import render_page, words


def as_text(found: Comparison) -> str:
    """Returns the tables as text for a terminal."""
    sections = (
        ("run", found.facts),
        ("cost", found.cost),
        ("config", found.config),
        ("score", found.scores),
    )
    rows = [row for _, part in sections for row in part]
    label = max([24, *(len(row.name) for row in rows)])
    widths = [
        max([len(name), *(len(row.cells[i]) for row in rows)]) for i, name in enumerate(found.names)
    ]
    widths = [min(width, 40) for width in widths]

    def line(name: str, cells: Sequence[str]) -> str:
        aligned = (f"{_cut(cell, width):>{width}}" for cell, width in zip(cells, widths))
        return f"{name:<{label}}  " + "  ".join(aligned)

    lines = []
    for title, part in sections:
        if part:
            lines += ["", line(title, found.names), *(line(row.name, row.cells) for row in part)]
    return "\n".join([*lines[1:], *(f"note: {note}" for note in found.notes)])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def as_html(found: Comparison) -> str:
    """Returns the tables and learning curves as one self-contained HTML page."""
    return render_page(
        "comparison.html.jinja",
        title=" / ".join(found.names),
        names=found.names,
        found=found,
        scores=[Row(words(row.name), row.cells) for row in found.scores],
    )
