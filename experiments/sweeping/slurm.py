"""A launcher that starts runs as array jobs of a Slurm cluster, by submitit (the extra 'sweep').

A job that Slurm preempts, or whose time is over, gets a signal some seconds before; it saves, is
requeued and resumes from its checkpoint. The job of each run is stored in the folder of the jobs,
so that a sweep that is started again watches them and submits nothing twice.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.sweeping.jobs import End, Job, last_lines
from experiments.sweeping.runs import Run, environment, python_command
from unified_mm.files import read_json, write_json

QUEUED = ("PENDING", "READY", "REQUEUED", "PREEMPTED", "UNKNOWN", "REQUEUE_HOLD", "SUSPENDED")
WORKING = ("RUNNING", "COMPLETING", "CONFIGURING")
# Of these submitit asks no more, or there is no accounting that would tell.
UNSURE = ("UNKNOWN", "SUSPENDED", "REQUEUE_HOLD", "CONFIGURING")
FORGOTTEN = "FORGOTTEN"  # neither in accounting nor in the queue
GRACE = 300  # seconds between Slurm's signal and the end of a job: a checkpoint is written in them
EVERY = 30  # seconds at most that a job's state is old; asked for all jobs at once
TIMEOUTS = 1000  # times that a job may be taken up again after its time was over


class Training:
    """The function of a job; submitit pickles it, and calls `checkpoint` when the job must end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def __call__(self, command: list[str], folder: str, variables: dict[str, str]) -> int:
        """Runs the command.

        Raises:
          RuntimeError: if the command fails, so that the job fails too.
        """
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **variables},
            # Slurm may signal the whole group: the run is told once, by `checkpoint`.
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
        )
        code = self._process.wait()
        if code:
            raise RuntimeError(f"the run ended with exit code {code}")
        return code

    def checkpoint(self, command: list[str], folder: str, variables: dict[str, str]) -> Any:
        """Makes the run save and end, and returns the same command for the next job."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            # This interrupts `wait` above, which holds the process's lock: look past it.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Training(), command, folder, variables)


@dataclass
class SlurmJob:
    """A run as a task of an array job."""

    run: Run
    handle: Any
    watcher: Watcher

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
        return self.watcher.state(self.handle.job_id)


@dataclass
class Watcher:
    """The states of jobs, for which Slurm is asked seldom, and for all jobs at once.

    Attributes:
      info: submitit's watcher, which stores what accounting (sacct) said.
    """

    info: Any
    _doubted: dict[str, float] = field(default_factory=dict)

    def state(self, job_id: str) -> str:
        """Returns the state in capitals, `FORGOTTEN` if Slurm does not know the job any more."""
        state = self._told(job_id)
        if state not in UNSURE:
            self._doubted.pop(job_id, None)
            return state
        if time.monotonic() < self._doubted.setdefault(job_id, time.monotonic() + EVERY):
            return state
        del self._doubted[job_id]
        return self.state_now(job_id)

    def state_now(self, job_id: str) -> str:
        """Returns the state without the cache."""
        self.info.clear()
        state = self._told(job_id)
        return FORGOTTEN if state == "UNKNOWN" and not may_be_queued(job_id) else state

    def _told(self, job_id: str) -> str:
        # 'CANCELLED by 1000' has its reason behind the word.
        return str(self.info.get_state(job_id)).upper().split()[0]


def may_be_queued(job_id: str) -> bool:
    """Returns whether Slurm's queue holds the job, True if that cannot be asked."""
    asked = subprocess.run(
        ["squeue", "-h", "-o", "%T", "-j", job_id], capture_output=True, text=True
    )
    if asked.returncode:
        return "invalid job id" not in asked.stderr.lower()
    return bool(asked.stdout.strip())


@dataclass
class Slurm:
    """A launcher that submits all missing runs as one array job.

    Attributes:
      folder: the folder of scripts, logs and the list of jobs, on a disk that all nodes share.
      parallel: tasks of the array at a time; 0 for no limit.
      partition: the partition; '' for the cluster's default.
      minutes: the time limit, after which a job is requeued.
      gpus: GPUs of each job, on one node.
      cpus: cores of each job, on one node.

    Raises:
      ValueError: if submitit or Slurm is missing, or a number is out of range.
    """

    folder: Path
    parallel: int
    partition: str
    minutes: int
    gpus: int
    cpus: int
    _jobs: dict[str, str] = field(default_factory=dict)
    _watcher: Watcher = field(init=False)

    def __post_init__(self) -> None:
        try:
            from submitit.slurm.slurm import SlurmInfoWatcher
        except ImportError as error:
            raise ValueError(
                "--launcher=slurm needs submitit: pip install -e '.[sweep]'"
            ) from error
        if shutil.which("sbatch") is None:
            raise ValueError("--launcher=slurm needs Slurm: there is no sbatch on the path")
        if self.parallel < 0 or self.minutes < 1 or self.gpus < 0 or self.cpus < 1:
            raise ValueError("--jobs and --gpus must be at least 0, --time and --cpus at least 1")
        self._watcher = Watcher(SlurmInfoWatcher(delay_s=EVERY))
        if self._list.is_file():
            self._jobs.update(read_json(self._list))

    @property
    def _list(self) -> Path:
        return self.folder / "jobs.json"

    def room(self, working: int) -> int:
        return 10**6

    def start(self, runs: Sequence[Run]) -> list[SlurmJob]:
        count = len(runs)
        handles = self._executor(count).map_array(
            Training(),
            [python_command(run) for run in runs],
            [os.getcwd()] * count,
            [{"PYTHONPATH": environment()["PYTHONPATH"]}] * count,
        )
        started = [
            SlurmJob(run, handle, self._watcher) for run, handle in zip(runs, handles, strict=True)
        ]
        self._jobs.update({job.run.name: job.handle.job_id for job in started})
        write_json(self._list, self._jobs)
        return started

    def found(self, run: Run) -> Job | None:
        if run.name not in self._jobs:
            return None
        from submitit import SlurmJob as Handle

        handle: Any = Handle(self.folder, self._jobs[run.name])
        job = SlurmJob(run, handle, self._watcher)
        if self._watcher.state_now(handle.job_id) in (*QUEUED, *WORKING):
            return job
        del self._jobs[run.name]  # ended or forgotten: it is started anew
        return None

    def leave(self) -> str:
        """Leaves the jobs in the queue of the cluster, and returns a message."""
        return "the jobs stay in Slurm's queue; the same command watches them again"

    def _executor(self, count: int) -> Any:
        from submitit import SlurmExecutor

        executor = SlurmExecutor(self.folder, max_num_timeout=TIMEOUTS)
        executor.update_parameters(
            job_name=self.folder.parent.name,
            partition=self.partition or None,
            time=self.minutes,
            nodes=1,
            ntasks_per_node=1,
            cpus_per_task=self.cpus,
            gpus_per_node=self.gpus or None,
            array_parallelism=self.parallel or count,
            signal_delay_s=min(GRACE, 30 * self.minutes),
            additional_parameters={"requeue": True},
        )
        return executor
