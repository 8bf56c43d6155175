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
    """A matplotlib figure as SVG that says nothing of when it was drawn."""
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
