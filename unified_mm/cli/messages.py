"""What the commands share: lines for the terminal, the table of scores, errors in one line."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import logging as absl_logging

from unified_mm.runs.checkpoints import CheckpointError
from unified_mm.runs.folder import RunFolder, RunFolderError
from unified_mm.runs.seal import is_sealed

# What a user can put right; anything else is our fault and shows where it happened.
USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    NotADirectoryError,
    PermissionError,
    RunFolderError,
    CheckpointError,
)


def say(text: str) -> None:
    """A line of progress for the person at the terminal; ends where nobody reads on (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Else Python tries to write the rest when it ends, and complains again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


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


def end_with(work: Callable[[], int], *, interrupted: str = "interrupted") -> NoReturn:
    """Ends the process with the exit code of `work()`."""
    for stream in (sys.stdout, sys.stderr):  # names and texts that the terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells each of its steps otherwise
    sys.exit(exit_code(work, interrupted=interrupted))


def new_file(output: str) -> Path | None:
    """The file that `--output` names, None for ''.

    Raises ValueError where it exists, or its folder does not or cannot be written to.
    """
    if not output:
        return None
    path = Path(output)
    if os.path.lexists(path):
        raise ValueError(f"--output={path} exists and is not overwritten; name a new file")
    if not os.path.isdir(path.parent):
        raise ValueError(f"--output={path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--output={path}: the folder {path.parent} cannot be written to")
    return path


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or one behind it, is that nothing more can be written."""
    seen: set[int] = set()
    behind: list[BaseException | None] = [error]
    while behind:
        each = behind.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        number = each.errno if isinstance(each, OSError) else None
        # What writes arrays raises errors of its own kinds.
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(each):
            return True
        behind += [each.__cause__, each.__context__]
    return False


def is_news(record: logging.LogRecord) -> bool:
    """Whether a log's record says more than `disk_full` will; for the log's filters."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not disk_is_full(error)


def disk_full(folder: RunFolder) -> str:
    """For a run that could not be written: how far it came."""
    names = [path.name for path in folder.checkpoints.glob("*") if is_sealed(path)]
    steps = [int(name) for name in names if name.isdecimal()]
    last = f"the last whole checkpoint is step {max(steps)}" if steps else "no checkpoint is whole"
    return (
        f"no space left on device for {folder.path}; {last}. Make room, and the same command goes "
        "on from there"
    )


def score_table(result: dict) -> str:
    """Scores beside chance and ceiling, one a line."""
    lines = [f"{'score':<58}{'value':>9}{'chance':>9}{'ceiling':>9}"]
    for name, value in result["scores"].items():
        cells = [value, result["chance"].get(name), result["ceiling"].get(name)]
        lines.append(
            f"{name:<58}" + "".join(f"{'' if c is None else f'{c:.3f}':>9}" for c in cells)
        )
    return "\n".join(lines)
