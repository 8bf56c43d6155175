"""Interfaces of jobs and launchers: a job is a run that is executing, a launcher starts jobs."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from experiments.sweeping.runs import Run
from unified_mm.runs.folder import RunFolder, RunLocked

SAID = 12  # last lines of a failed run that are shown


@dataclass(frozen=True)
class End:
    """How a job ended; its run's folder says whether the run is finished.

    Attributes:
      code: 0 if nothing went wrong, 128 + n or -n after signal n.
      last_lines: the last lines of the process's output.
      again: whether the job was not of this sweep, which may now start the run itself.
    """

    code: int
    last_lines: tuple[str, ...] = ()
    again: bool = False

    def __str__(self) -> str:
        if self.code < 0:
            return f"ended by {signal.Signals(-self.code).name}"
        return f"exit code {self.code}"


class Job(Protocol):
    """A run that is executing."""

    run: Run

    def state(self) -> str:
        """Returns 'running' or 'queued', for a job that has not ended."""

    def ended(self) -> End | None:
        """Returns how the job ended, None if it has not."""

    def stop(self) -> None:
        """Asks the job to save and end, and returns at once."""


class Launcher(Protocol):
    """Starts jobs, and finds those that an earlier sweep left running."""

    def room(self, working: int) -> int:
        """Returns how many more jobs fit beside `working` jobs."""

    def start(self, runs: Sequence[Run]) -> Sequence[Job]:
        """Starts a job for each run."""

    def found(self, run: Run) -> Job | None:
        """Returns the job that already executes this run, None if there is none."""

    def leave(self) -> str:
        """Leaves the jobs before they end, and returns a message that says what becomes of them."""


@dataclass
class ElsewhereJob:
    """A run that a process of another sweep, or of a person, executes."""

    run: Run

    def state(self) -> str:
        return "running"

    def ended(self) -> End | None:
        return None if held(self.run.folder) else End(0, again=True)

    def stop(self) -> None:
        """Does nothing: the job is not of this sweep."""


def held(folder: RunFolder) -> bool:
    """Returns whether a process on this machine executes the run."""
    if not folder.path.is_dir():
        return False
    try:
        with folder.lock():
            return False
    except RunLocked:
        return True


def last_lines(path: Path) -> tuple[str, ...]:
    """Returns the last lines of a log that are not empty."""
    if not path.is_file():
        return ()
    # A progress bar rewrites its line: only what it said last counts.
    text = path.read_bytes()[-20000:].decode(errors="replace")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return tuple([line for line in lines if line][-SAID:])
