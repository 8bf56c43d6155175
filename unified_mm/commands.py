"""What the commands share: lines for the terminal, the table of scores, errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from unified_mm.runs.checkpoints import CheckpointError
from unified_mm.runs.folder import RunFolderError

# What a user can put right; anything else is our fault and shows where it happened.
USER_ERRORS = (ValueError, FileNotFoundError, RunFolderError, CheckpointError)


def say(text: str) -> None:
    """A line of progress for the person at the terminal."""
    print(text, flush=True)


def exit_code(work: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """What `work` returns; a user's error is said in one line and gives 1, Ctrl-C gives 130."""
    try:
        return work()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def new_file(output: str) -> Path | None:
    """The file that `--output` names, None for ''. Raises ValueError where it exists."""
    if not output:
        return None
    path = Path(output)
    if path.exists():
        raise ValueError(f"--output={path} exists and is not overwritten; name a new file")
    return path


def score_table(result: dict) -> str:
    """Scores beside chance and ceiling, one a line."""
    lines = [f"{'score':<58}{'value':>9}{'chance':>9}{'ceiling':>9}"]
    for name, value in result["scores"].items():
        cells = [value, result["chance"].get(name), result["ceiling"].get(name)]
        lines.append(
            f"{name:<58}" + "".join(f"{'' if c is None else f'{c:.3f}':>9}" for c in cells)
        )
    return "\n".join(lines)
