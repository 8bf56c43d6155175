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


def as_svg(figure: Any) -> str:
    """Returns a matplotlib figure as SVG; the same figure always gives the same bytes."""
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "unified_mm"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
