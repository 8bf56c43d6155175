"""What carries runs out: a job is a run at work, a launcher starts jobs."""

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
      code: 0 where nothing went wrong, 128 + n or -n after signal n.
      last_lines: of what the process said.
      again: it was no job of this sweep, which may start the run itself now.
    """

    code: int
    last_lines: tuple[str, ...] = ()
    again: bool = False

    def __str__(self) -> str:
        if self.code < 0:
            return f"ended by {signal.Signals(-self.code).name}"
        return f"exit code {self.code}"


class Job(Protocol):
    """A run at work."""

    run: Run

    def state(self) -> str:
        """'running' or 'queued'; only of a job that has not ended."""

    def ended(self) -> End | None:
        """How it ended, None while it has not."""

    def stop(self) -> None:
        """Asks it to save and end; returns at once."""


class Launcher(Protocol):
    """Starts jobs; also finds those again that an earlier sweep left at work."""

    def room(self, working: int) -> int:
        """How many more jobs it takes beside so many."""

    def start(self, runs: Sequence[Run]) -> Sequence[Job]:
        """A job for each."""

    def found(self, run: Run) -> Job | None:
        """A job that is at work on this run already."""

    def leave(self) -> str:
        """The sweep ends before its jobs do: what becomes of them, in words, once that is so."""


@dataclass
class ElsewhereJob:
    """A run that a process of another sweep, or of a person, is at work on."""

    run: Run

    def state(self) -> str:
        return "running"

    def ended(self) -> End | None:
        return None if held(self.run.folder) else End(0, again=True)

    def stop(self) -> None:
        """It is not ours to stop."""


def held(folder: RunFolder) -> bool:
    """Whether a process on this machine is at work on the run."""
    if not folder.path.is_dir():
        return False
    try:
        with folder.lock():
            return False
    except RunLocked:
        return True


def last_lines(path: Path) -> tuple[str, ...]:
    """The end of a log: the last lines that say something."""
    if not path.is_file():
        return ()
    # A progress bar rewrites its line: only what it said last counts.
    text = path.read_bytes()[-20000:].decode(errors="replace")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return tuple([line for line in lines if line][-SAID:])
