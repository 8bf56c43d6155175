"""What pictures of results have in common."""

from __future__ import annotations

import io
from typing import Any


def as_svg(figure: Any) -> str:
    """A matplotlib figure as SVG that says nothing of when it was drawn."""
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
