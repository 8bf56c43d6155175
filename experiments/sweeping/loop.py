"""Carries a sweep out: starts what is missing, watches what is at work, stops cleanly."""

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
    """A signal asked the sweep to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def first_rows(runs: Sequence[Run]) -> list[Row]:
    """Each run as its folder shows it: finished, waiting, or another run in its place."""
    rows = []
    for run in runs:
        try:
            rows.append(Row(run, "finished" if finished(run) else "waiting"))
        except (ValueError, RuntimeError) as error:
            rows.append(Row(run, "differs", said=str(error)))
    return rows


def carry_out(rows: list[Row], launcher: Launcher, table: Table, interval: float) -> None:
    """Runs what waits, until every row is finished, failed or differs.

    Args:
      rows: of `first_rows`; they are kept up to date.
      launcher: starts the runs.
      table: is shown whenever `interval` seconds are over.

    Raises:
      Told: SIGTERM or Ctrl-C. Whatever is raised, the launcher has seen to its jobs.
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
    """Takes up what is at work already, then starts as much as there is room for."""
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
    """What has become of a job."""
    end = job.ended()
    row.progress = progress_of(row.run.folder)
    if end is None:
        row.state = job.state()
        return
    del jobs[row.run.name]
    settle(row, end)


def settle(row: Row, end: End) -> None:
    """A job has ended: its run is finished, failed, or (given up by another) waits again."""
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
    """Raises `SweepStopped` at the first signal, at once or when it is held no longer."""

    def __init__(self) -> None:
        self._held = False
        self._number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        if not self._held:
            raise SweepStopped(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is within is not cut off."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._number is not None:
            raise SweepStopped(self._number)


@contextlib.contextmanager
def signals_told() -> Iterator[Signals]:
    """SIGTERM and Ctrl-C raise `SweepStopped` once; a second one does what it did before."""
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
