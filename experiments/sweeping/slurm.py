"""Runs as array jobs of a Slurm cluster, by submitit (the extra 'sweep').

A job that Slurm preempts or whose time is over gets a signal some seconds before; it saves, is
put into the queue again and goes on from its checkpoint. Which job a run has is kept beside the
jobs, so that a sweep that is started again watches them and submits nothing twice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.sweeping.jobs import End, Job, last_lines
from experiments.sweeping.runs import Run, environment, python_command
from unified_mm.runs.folder import read_json, write_json

QUEUED = ("PENDING", "READY", "REQUEUED", "PREEMPTED", "UNKNOWN", "REQUEUE_HOLD", "SUSPENDED")
WORKING = ("RUNNING", "COMPLETING", "CONFIGURING")
GRACE = 300  # seconds between Slurm's signal and the end of a job: a checkpoint is written in them
EVERY = 30  # seconds at most that a job's state is old; asked for all jobs at once
TIMEOUTS = 1000  # times that a job may be taken up again after its time was over


class Training:
    """What a job does; submitit pickles it, and calls `checkpoint` where the job must end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def __call__(self, command: list[str], folder: str, variables: dict[str, str]) -> int:
        """Runs the command. Raises RuntimeError where it fails, so that the job fails too."""
        self._process = subprocess.Popen(command, cwd=folder, env={**os.environ, **variables})
        code = self._process.wait()
        if code:
            raise RuntimeError(f"the run ended with exit code {code}")
        return code

    def checkpoint(self, command: list[str], folder: str, variables: dict[str, str]) -> Any:
        """The run saves and ends; the same command goes on in the next job."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            # This interrupts `wait` above, which holds the process's lock: look past it.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Training(), command, folder, variables)


@dataclass
class SlurmJob:
    """A task of an array job; `watcher` asks Slurm for its state."""

    run: Run
    handle: Any
    watcher: Any

    def state(self) -> str:
        return "running" if self._slurm_state() in WORKING else "queued"

    def ended(self) -> End | None:
        state = self._slurm_state()
        if state in QUEUED or state in WORKING:
            return None
        lines = last_lines(self.handle.paths.stderr) or last_lines(self.handle.paths.stdout)
        return End(0 if state == "COMPLETED" else 1, (f"Slurm says {state}", *lines))

    def stop(self) -> None:
        self.handle.cancel(check=False)

    def _slurm_state(self) -> str:
        # 'CANCELLED by 1000' has its reason behind the word.
        return str(self.watcher.get_state(self.handle.job_id)).upper().split()[0]


def is_queued(job_id: str) -> bool:
    """Whether Slurm's queue holds the job."""
    asked = subprocess.run(["squeue", "-h", "-o", "%T", "-j", job_id], capture_output=True)
    return asked.returncode == 0 and bool(asked.stdout.strip())


@dataclass
class Slurm:
    """Submits all that is missing as one array.

    Attributes:
      folder: for scripts, logs and the list of jobs; on a disk that all nodes share.
      parallel: tasks of the array at a time; 0 is as many as the cluster gives.
      minutes: after which a job is requeued.
      gpus, cpus: of each job, on one node.
    """

    folder: Path
    parallel: int
    partition: str
    minutes: int
    gpus: int
    cpus: int
    _jobs: dict[str, str] = field(default_factory=dict)
    _watcher: Any = None

    def __post_init__(self) -> None:
        try:
            from submitit.slurm.slurm import SlurmInfoWatcher
        except ImportError as error:
            raise ValueError(
                "--launcher=slurm needs submitit: pip install -e '.[sweep]'"
            ) from error
        if self.parallel < 0 or self.minutes < 1 or self.gpus < 0 or self.cpus < 1:
            raise ValueError("--jobs and --gpus must be at least 0, --time and --cpus at least 1")
        self._watcher = SlurmInfoWatcher(delay_s=EVERY)
        if self._list.is_file():
            self._jobs.update(read_json(self._list))

    @property
    def _list(self) -> Path:
        return self.folder / "jobs.json"

    def room(self, working: int) -> int:
        return 10**6

    def start(self, runs: Sequence[Run]) -> list[SlurmJob]:
        commands = [python_command(run) for run in runs]
        variables = {"PYTHONPATH": environment()["PYTHONPATH"]}
        here = os.getcwd()
        count = len(runs)
        handles = self._executor(count).map_array(
            Training(), commands, [here] * count, [variables] * count
        )
        for run, handle in zip(runs, handles, strict=True):
            self._jobs[run.name] = handle.job_id
        write_json(self._list, self._jobs)
        return [
            SlurmJob(run, handle, self._watcher) for run, handle in zip(runs, handles, strict=True)
        ]

    def found(self, run: Run) -> Job | None:
        if run.name not in self._jobs:
            return None
        from submitit import SlurmJob as Handle

        handle: Any = Handle(self.folder, self._jobs[run.name])
        job = SlurmJob(run, handle, self._watcher)
        state = self._watcher.get_state(handle.job_id, mode="force")
        # Accounting learns of a new job late. One that Slurm has forgotten is started anew.
        if (state != "UNKNOWN" or is_queued(handle.job_id)) and job.ended() is None:
            return job
        del self._jobs[run.name]
        return None

    def leave(self, jobs: Sequence[Job]) -> str:
        """They are the cluster's now."""
        return "the jobs stay in Slurm's queue; the same command watches them again"

    def _executor(self, count: int) -> Any:
        from submitit import SlurmExecutor

        executor = SlurmExecutor(self.folder, max_num_timeout=TIMEOUTS)
        chosen: dict[str, Any] = {
            "job_name": self.folder.parent.name,
            "time": self.minutes,
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": self.cpus,
            "array_parallelism": self.parallel or count,
            "signal_delay_s": min(GRACE, 30 * self.minutes),
            "additional_parameters": {"requeue": True},
        }
        if self.gpus:
            chosen["gpus_per_node"] = self.gpus
        if self.partition:
            chosen["partition"] = self.partition
        executor.update_parameters(**chosen)
        return executor
