"""Runs as processes of this machine, some at a time."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.sweeping.jobs import ElsewhereJob, End, Job, held, last_lines
from experiments.sweeping.runs import Run, environment, python_command


@dataclass
class LocalJob:
    """A process of its own; what it says is in `log`."""

    run: Run
    process: subprocess.Popen
    log: Path

    def state(self) -> str:
        return "running"

    def ended(self) -> End | None:
        code = self.process.poll()
        return None if code is None else End(code, last_lines(self.log))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)


@dataclass(frozen=True)
class Local:
    """At most `jobs` processes; what they say goes into `logs`."""

    jobs: int
    logs: Path

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"--jobs={self.jobs}: must be at least 1")

    def room(self, working: int) -> int:
        return max(0, self.jobs - working)

    def start(self, runs: Sequence[Run]) -> list[LocalJob]:
        self.logs.mkdir(parents=True, exist_ok=True)
        return [self._start(run) for run in runs]

    def found(self, run: Run) -> Job | None:
        return ElsewhereJob(run) if held(run.folder) else None

    def leave(self, jobs: Sequence[Job]) -> str:
        """They save and end, for nobody would start the next ones after them."""
        ours = [job for job in jobs if isinstance(job, LocalJob)]
        for job in ours:
            job.stop()
        for job in ours:
            job.process.wait()
        return "the runs at work have saved and ended; the same command goes on"

    def _start(self, run: Run) -> LocalJob:
        log = self.logs / f"{run.name}.log"
        with open(log, "ab") as file:
            process = subprocess.Popen(
                python_command(run),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                # Ctrl-C is the sweep's, which then stops its runs, once each.
                start_new_session=True,
            )
        return LocalJob(run, process, log)
