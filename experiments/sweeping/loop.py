"""The loop of a sweep: starts missing runs, watches running ones, stops cleanly."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

from experiments.sweeping.jobs import End, Job, Launcher
from experiments.sweeping.progress import progress_of
from experiments.sweeping.runs import Run, finished
from experiments.sweeping.table import Row, Table


class SweepStopped(Exception):
    """Error for a signal that asked the sweep to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def first_rows(runs: Sequence[Run]) -> list[Row]:
    """Returns a row for each run: finished, waiting, or another run in its folder."""
    rows = []
    for run in runs:
        try:
            rows.append(Row(run, "finished" if finished(run) else "waiting"))
        except (ValueError, RuntimeError) as error:
            rows.append(Row(run, "differs", said=str(error)))
    return rows


def carry_out(rows: list[Row], launcher: Launcher, table: Table, interval: float) -> None:
    """Executes the waiting runs, until every row is finished, failed or differs.

    Args:
      rows: the rows of `first_rows`; they are kept up to date.
      launcher: starts the runs.
      table: is shown every `interval` seconds.
      interval: seconds between two looks at the jobs.

    Raises:
      SweepStopped: if SIGTERM or Ctrl-C arrives. Whatever is raised, the launcher has left its
        jobs.
    """
    jobs: dict[str, Job] = {}
    with signals_told() as signals:
        try:
            while any(row.state in ("waiting", "queued", "running") for row in rows):
                with signals.held():  # until what is started is known
                    begin(rows, launcher, jobs)
                for row in rows:
                    if job := jobs.get(row.run.name):
                        look(row, job, jobs)
                table.show(rows)
                if jobs:
                    time.sleep(interval)
        except BaseException:
            print(launcher.leave(), flush=True)
            raise


def begin(rows: Sequence[Row], launcher: Launcher, jobs: dict[str, Job]) -> None:
    """Takes up jobs that are already running, then starts as many as there is room for."""
    waiting = []
    for row in rows:
        if row.state != "waiting":
            continue
        try:
            job = launcher.found(row.run)
        except (ValueError, RuntimeError) as error:  # something else lies in its place
            row.state, row.said = "differs", str(error)
            continue
        if job:
            jobs[row.run.name] = job
            row.state = job.state()
        else:
            waiting.append(row)
    chosen = waiting[: launcher.room(len(jobs))]
    if not chosen:
        return
    started = launcher.start([row.run for row in chosen])
    for row, job in zip(chosen, started, strict=True):
        jobs[row.run.name] = job
        row.state = job.state()


def look(row: Row, job: Job, jobs: dict[str, Job]) -> None:
    """Updates a row with the state of its job."""
    end = job.ended()
    row.progress = progress_of(row.run.folder)
    if end is None:
        row.state = job.state()
        return
    del jobs[row.run.name]
    settle(row, end)


def settle(row: Row, end: End) -> None:
    """Updates the row of a job that has ended: finished, failed, or waiting again.

    It waits again if another process has given the run up.
    """
    try:
        done = finished(row.run)
    except (ValueError, RuntimeError) as error:
        row.state, row.said = "differs", str(error)
        return
    if done:
        row.state = "finished"
        row.progress = replace(row.progress, step=row.progress.steps or row.progress.step)
    elif end.again:
        row.state = "waiting"
    else:
        row.state = "failed"
        row.said = "\n".join([str(end), *(f"  | {line}" for line in end.last_lines)])


class Signals:
    """A signal handler that raises `SweepStopped`, at once or at the end of `held`."""

    def __init__(self) -> None:
        self._held = False
        self._number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        if not self._held:
            raise SweepStopped(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delays `SweepStopped` until the end of the body.

        Raises:
          SweepStopped: if a signal arrived.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._number is not None:
            raise SweepStopped(self._number)


@contextlib.contextmanager
def signals_told() -> Iterator[Signals]:
    """Makes SIGTERM or Ctrl-C raise `SweepStopped` once; a second signal acts as before."""
    told = Signals()
    before: dict[int, Any] = {}

    def tell(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        told(number, frame)

    for watched in (signal.SIGTERM, signal.SIGINT):
        before[watched] = signal.signal(watched, tell)
    try:
        yield told
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
