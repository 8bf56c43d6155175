"""Output of the commands: progress lines, the table of scores, one-line errors, exit codes."""

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

from unified_mm.cli.interrupts import EXIT_CODE, leave_at_end, leaving_on_interrupt
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
    """Prints a line of progress; ends the process if the reader has closed the pipe (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Else Python tries to write the rest when it ends, and complains again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def exit_code(work: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """Returns the exit code of `work()`.

    A user's error is printed in one line and gives 1; Ctrl-C prints `interrupted` and gives 130.
    """
    with leaving_on_interrupt(interrupted) as interrupts:
        try:
            code = work()
        except USER_ERRORS as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:
            interrupts.say()
            interrupts.heard = True  # the thread that listens may not have come to it yet
            code = EXIT_CODE
        if interrupts.heard:
            leave_at_end(code)
        return code


def end_with(work: Callable[[], int], *, interrupted: str = "interrupted") -> NoReturn:
    """Ends the process with the exit code of `work()`."""
    for stream in (sys.stdout, sys.stderr):  # names and texts that the terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells each of its steps otherwise
    sys.exit(exit_code(work, interrupted=interrupted))


def new_file(output: str) -> Path | None:
    """Returns the file that `--output` names, None for ''.

    Raises:
      ValueError: if the file exists, or its folder does not exist or cannot be written to.
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
    """Returns whether an error, or one of its causes, says that the disk is full."""
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
    """Returns whether a log record says more than `disk_full` will; a filter for the log."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not disk_is_full(error)


def disk_full(folder: RunFolder) -> str:
    """Returns the message for a run that could not be written, with its last whole checkpoint."""
    names = [path.name for path in folder.checkpoints.glob("*") if is_sealed(path)]
    steps = [int(name) for name in names if name.isdecimal()]
    last = f"the last whole checkpoint is step {max(steps)}" if steps else "no checkpoint is whole"
    return (
        f"no space left on device for {folder.path}; {last}. Make room, and the same command goes "
        "on from there"
    )


def score_table(result: dict) -> str:
    """Returns a table of scores with chance and ceiling, one score a line."""
    lines = [f"{'score':<58}{'value':>9}{'chance':>9}{'ceiling':>9}"]
    for name, value in result["scores"].items():
        cells = [value, result["chance"].get(name), result["ceiling"].get(name)]
        lines.append(
            f"{name:<58}" + "".join(f"{'' if c is None else f'{c:.3f}':>9}" for c in cells)
        )
    return "\n".join(lines)
