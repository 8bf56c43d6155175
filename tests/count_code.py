"""Counts lines of code: `python tests/count_code.py [FOLDER ...]`; the package and experiments.

Docstrings, comments, blank lines and imports are not counted. Beside the lines it says how many
files hold them, `__init__.py` apart.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("unified_mm", "experiments")
# Tokens that make no line one of code.
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Returns how many lines of a file hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) or is_docstring(node):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def is_docstring(node: ast.AST) -> bool:
    """Returns whether a node is a text that stands alone."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def count(folders: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Returns files (without `__init__.py`) and lines of code by folder."""
    found = {}
    for folder in folders:
        files = sorted(folder.rglob("*.py"))
        lines = sum(code_lines(path.read_text()) for path in files)
        found[folder.name] = (sum(path.name != "__init__.py" for path in files), lines)
    return found


if __name__ == "__main__":
    counted = count([Path(each) for each in sys.argv[1:]] or [ROOT / name for name in FOLDERS])
    for name, (files, lines) in counted.items():
        print(f"{name}: {lines:,} lines of code in {files} files")
    print(f"together: {sum(lines for _, lines in counted.values()):,} lines of code")
