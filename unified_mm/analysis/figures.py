"""What pictures of results have in common."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Drawing:
    """SVG that a notebook shows."""

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg


def as_svg(figure: Any) -> str:
    """A matplotlib figure as SVG: the same drawing gives the same bytes, whenever it is drawn."""
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "unified_mm"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
