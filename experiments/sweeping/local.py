"""A launcher that starts runs as processes of this machine, some at a time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.sweeping.jobs import ElsewhereJob, End, Job, held, last_lines
from experiments.sweeping.runs import Run, environment, python_command
from unified_mm.costs.memory_share import UNSAID, said, with_share

GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass
class LocalJob:
    """A run as a process of this machine, whose output is in `log`."""

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
    """A launcher of processes of this machine, each with its share of the cores and GPUs.

    Attributes:
      jobs: how many processes run at a time.
      logs: the folder of their logs.

    Raises:
      ValueError: if `jobs` is below 1.
    """

    jobs: int
    logs: Path
    _taken: dict[int, LocalJob] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"--jobs={self.jobs}: must be at least 1")

    def room(self, working: int) -> int:
        return max(0, self.jobs - working)

    def start(self, runs: Sequence[Run]) -> list[LocalJob]:
        self.logs.mkdir(parents=True, exist_ok=True)
        return [self._start(run, self._free_place()) for run in runs]

    def found(self, run: Run) -> Job | None:
        return ElsewhereJob(run) if held(run.folder) else None

    def leave(self) -> str:
        """Stops the runs, waits until they have saved and ended, and returns a message."""
        for job in self._taken.values():
            job.stop()
        for job in self._taken.values():
            job.process.wait()
        return "the runs at work have saved and ended; the same command goes on"

    def _free_place(self) -> int:
        at_work = {place for place, job in self._taken.items() if job.process.poll() is None}
        return min(set(range(self.jobs)) - at_work)

    def _start(self, run: Run, place: int) -> LocalJob:
        log = self.logs / f"{run.name}.log"
        with open(log, "ab") as file:
            process = subprocess.Popen(
                python_command(run),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={
                    **environment(),
                    **share_of_gpus(os.environ, visible_gpus(), place, self.jobs),
                },
                # Ctrl-C is the sweep's, which then stops its runs, once each.
                start_new_session=True,
            )
        job = self._taken[place] = LocalJob(run, process, log)
        if hasattr(os, "sched_setaffinity"):  # Linux; its threads begin later and inherit it
            cores = share_of(sorted(os.sched_getaffinity(0)), place, self.jobs)
            with contextlib.suppress(ProcessLookupError):  # it has failed already
                os.sched_setaffinity(process.pid, cores)
        return job


def share_of(things: Sequence[Any], place: int, places: int) -> list[Any]:
    """Returns the share of one of `places`; with fewer things than places, some share one."""
    return list(things[place % len(things) :: places])


def share_of_gpus(
    variables: Mapping[str, str], gpus: Sequence[str], place: int, places: int
) -> dict[str, str]:
    """Returns environment variables that give one of `places` its GPUs, or its part of one."""
    if not gpus or places == 1:
        return {}
    chosen = {GPUS: ",".join(share_of(gpus, place, places))}
    if places > len(gpus) and not said(variables):  # all together take what one would
        chosen = with_share(chosen, UNSAID / -(-places // len(gpus)))
    return chosen


def visible_gpus() -> list[str]:
    """Returns the GPUs that `CUDA_VISIBLE_DEVICES` lists, else all of this machine."""
    listed = os.environ.get(GPUS)
    if listed is not None:
        return [each for each in listed.split(",") if each]
    names = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*"))
    return sorted((found[1] for found in names if found), key=int)
